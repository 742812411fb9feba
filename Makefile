# Everything installs what it needs by itself: the CPU stack into .venv, the GPU stack into .venv-gpu (their TRLs differ).
PYTHON ?= python3
# PyTorch's own index of CPU builds, or another one: make smoke TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
RECIPE ?= recipes/ultrafeedback_zh_en.yaml
RECIPES ?= recipes/compare
TORCH_FROM = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: help smoke compare test test-unsloth train lint bench bench-quick gpu-check clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

smoke: .venv/installed  ## the whole job on this machine: a tiny Qwen3, two languages, about a minute
	.venv/bin/dpo-cli prepare recipes/smoke.yaml
	.venv/bin/dpo-cli train recipes/smoke.yaml
	.venv/bin/dpo-cli eval recipes/smoke.yaml
	.venv/bin/dpo-cli export recipes/smoke.yaml
	@echo; sed -n 3p runs/smoke/eval/report.md; echo "report: runs/smoke/eval/report.html"

compare: .venv/installed  ## DPO, IPO, SimPO, ORPO, KTO and LiPO on the smoke data (RECIPES=recipes/sweeps/beta for another folder)
	@for recipe in $(RECIPES)/*.yaml; do echo "train and eval $$recipe"; \
		.venv/bin/dpo-cli train $$recipe --quiet && .venv/bin/dpo-cli eval $$recipe --quiet || exit 1; done
	@set -- $(RECIPES)/*.yaml; first=$$1; shift; \
		.venv/bin/dpo-cli eval $$first --quiet $${1:+$$(printf -- '--compare %s ' "$$@")}

train: .venv-gpu/installed  ## the real job, on an NVIDIA card with 16 GB (RECIPE=… for another recipe)
	.venv-gpu/bin/dpo-cli train $(RECIPE)

test: .venv/installed-dev  ## all tests
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest

test-unsloth: .venv-unsloth/installed  ## what we take Unsloth for, against the package itself; no GPU needed
	OMP_NUM_THREADS=1 .venv-unsloth/bin/python -m pytest tests/unsloth_real

lint: .venv/installed-dev  ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/installed-dev  ## the figures of the README, measured here
	@for script in tests/benchmarks/bench_*.py; do echo "== $$script"; OMP_NUM_THREADS=1 .venv/bin/python $$script || exit 1; done

bench-quick: .venv/installed-dev  ## equal numbers and token counts of the training step, in half a minute
	@OMP_NUM_THREADS=1 .venv/bin/python tests/benchmarks/bench_train.py --quick

gpu-check: .venv-gpu/installed  ## what is claimed of a 16 GB card, asked of this one, in ten minutes, offline
	.venv-gpu/bin/python tests/benchmarks/gpu_check.py

clean:  ## remove the venvs (runs stay)
	rm -rf .venv .venv-gpu .venv-unsloth

# torch first and alone: asked for together with the rest, pip may take a CUDA build of several gigabytes.
.venv/installed: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet $(TORCH_FROM) torch==2.13.0
	.venv/bin/python -m pip install --quiet --editable '.[cpu,gguf,judge]'
	touch $@

.venv/installed-dev: .venv/installed
	.venv/bin/python -m pip install --quiet --editable '.[cpu,gguf,judge,serving,dev]'
	touch $@

.venv-gpu/installed: pyproject.toml
	test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --editable '.[unsloth,gguf,judge]'
	touch $@

# Unsloth's trainer and signatures on a machine without a GPU. By itself pip would resolve unsloth to a CUDA torch of
# gigabytes, through its torchvision and xformers; so what its import needs comes first, with the versions that it
# pins, and then Unsloth alone. Triton and Pillow are what unsloth_zoo imports beside that.
.venv-unsloth/installed: pyproject.toml Makefile
	test -x .venv-unsloth/bin/python || $(PYTHON) -m venv .venv-unsloth
	.venv-unsloth/bin/python -m pip install --quiet $(TORCH_FROM) torch==2.13.0
	.venv-unsloth/bin/python -m pip install --quiet --editable . torch==2.13.0 trl==1.15.0 transformers==5.17.0 \
	  datasets==4.8.5 peft==0.21.2 accelerate==1.15.0 bitsandbytes==0.50.2 triton==3.7.0 pillow 'pytest>=8.4' 'pytest-timeout>=2.4'
	.venv-unsloth/bin/python -m pip install --quiet --no-deps unsloth==2026.10.7 unsloth_zoo==2026.10.7
	touch $@
