# Everything installs what it needs by itself: the CPU stack into .venv, the GPU stack into .venv-gpu (their TRLs differ).
PYTHON ?= python3
# PyTorch's own index of CPU builds, or another one: make smoke TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
RECIPE ?= recipes/ultrafeedback_zh_en.yaml
TORCH_FROM = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: help smoke test train lint bench clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 10

smoke: .venv/installed  ## the whole job on this machine: a tiny Qwen3, two languages, about a minute
	.venv/bin/dpo-cli prepare recipes/smoke.yaml
	.venv/bin/dpo-cli train recipes/smoke.yaml
	.venv/bin/dpo-cli eval recipes/smoke.yaml
	.venv/bin/dpo-cli export recipes/smoke.yaml
	@echo; sed -n 3p runs/smoke/eval/report.md; echo "report: runs/smoke/eval/report.html"

train: .venv-gpu/installed  ## the real job, on an NVIDIA card with 16 GB (RECIPE=… for another recipe)
	.venv-gpu/bin/dpo-cli train $(RECIPE)

test: .venv/installed-dev  ## all tests
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest

lint: .venv/installed-dev  ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/installed-dev  ## the figures of the README, measured here
	@for script in tests/benchmarks/bench_*.py; do echo "== $$script"; OMP_NUM_THREADS=1 .venv/bin/python $$script || exit 1; done

clean:  ## remove both venvs (runs stay)
	rm -rf .venv .venv-gpu

# torch first and alone: asked for together with the rest, pip may take a CUDA build of several gigabytes.
.venv/installed: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet $(TORCH_FROM) torch==2.13.0
	.venv/bin/python -m pip install --quiet --editable '.[cpu]'
	touch $@

.venv/installed-dev: .venv/installed
	.venv/bin/python -m pip install --quiet --editable '.[cpu,dev]'
	touch $@

.venv-gpu/installed: pyproject.toml
	test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --editable '.[unsloth]'
	touch $@
