# Everything installs what it needs by itself: the CPU stack into .venv, the GPU stack into .venv-gpu (their TRLs differ).
PYTHON ?= python3
# Another index of torch's builds than PyPI: https://download.pytorch.org/whl/cpu for make smoke (gigabytes less),
# https://download.pytorch.org/whl/cu126 for make train with a driver older than 580.
TORCH_INDEX ?=
# ANYWAY=1 installs although the check of the machine found something.
ANYWAY ?=
export ANYWAY
# Images of containers set it, and every command would compile torch and transformers anew: eight CPU seconds.
unexport PYTHONDONTWRITEBYTECODE
RECIPE ?= recipes/ultrafeedback_zh_en.yaml
RECIPES ?= recipes/compare
# Of 20,000 files a few thousand are ever imported, and each is compiled when it is.
INSTALL = -m pip install --no-compile
TORCH_FROM = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

# Before gigabytes are downloaded: is this Python, driver, card and disk good enough for $(1), cpu or gpu?
define check
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'check: $(PYTHON) is not Python 3.11 or newer'; \
	  echo '  fix: install one, and name it: make … PYTHON=python3.12'; exit 1; } >&2
	@$(PYTHON) -m dpo_cli.preinstall $(1) $(TORCH_INDEX)
endef

.PHONY: help smoke rounds compare test test-all golden pictures test-unsloth train eval export check-cpu check-gpu lint bench bench-quick gpu-check clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

smoke: .venv/installed  ## the whole job on this machine: a tiny Qwen3, two languages, about a minute
	.venv/bin/dpo-cli prepare recipes/smoke.yaml
	.venv/bin/dpo-cli train recipes/smoke.yaml
	.venv/bin/dpo-cli eval recipes/smoke.yaml
	.venv/bin/dpo-cli export recipes/smoke.yaml
	@echo; .venv/bin/python -m tests.tools.show_answers runs/smoke

rounds: .venv/installed  ## three rounds of the built-in model's own answers, rated by its reward model, and a table of them
	@for round in round1 round2 round3; do echo "train and eval $$round"; \
		.venv/bin/dpo-cli train recipes/rounds/$$round.yaml --quiet && \
		.venv/bin/dpo-cli eval recipes/rounds/$$round.yaml --against base --quiet || exit 1; done
	@.venv/bin/python -m tests.tools.rounds_table runs/round1 runs/round2 runs/round3

compare: .venv/installed  ## DPO, IPO, SimPO, ORPO, KTO and LiPO on the smoke data (RECIPES=recipes/sweeps/beta for another folder)
	@for recipe in $(RECIPES)/*.yaml; do echo "train and eval $$recipe"; \
		.venv/bin/dpo-cli train $$recipe --quiet && .venv/bin/dpo-cli eval $$recipe --quiet || exit 1; done
	@set -- $(RECIPES)/*.yaml; first=$$1; shift; \
		.venv/bin/dpo-cli eval $$first --quiet $${1:+$$(printf -- '--compare %s ' "$$@")}

train: .venv-gpu/installed  ## the real job, on an NVIDIA card with 16 GB (RECIPE=… for another recipe)
	.venv-gpu/bin/dpo-cli train $(RECIPE)

eval: .venv-gpu/installed  ## how much better the trained model is, and report.html (RECIPE=…)
	.venv-gpu/bin/dpo-cli eval $(RECIPE)

export: .venv-gpu/installed  ## the trained model as files to serve, verified (RECIPE=…)
	.venv-gpu/bin/dpo-cli export $(RECIPE)

check-cpu:  ## whether make smoke can install here
	$(call check,cpu)

check-gpu:  ## whether make train can install and run here
	$(call check,gpu)

# Freed memory is kept: each step of a training frees all its tensors, and new pages would cost a quarter of its time.
TESTING = OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=2000000000
# Two at a time, unless told otherwise (TESTS="-n 8"): each takes a core and up to 2 GB. The longest files are first.
TESTS ?= -n 2
test: .venv/installed-dev  ## all tests but the slow ones
	$(TESTING) .venv/bin/python -m pytest $(TESTS) -m "not slow"

test-all: .venv/installed-dev .venv-unsloth/installed  ## all tests, those against Unsloth too
	$(TESTING) .venv/bin/python -m pytest $(TESTS)
	$(TESTING) .venv-unsloth/bin/python -m pytest tests/unsloth_real

golden: .venv/installed-dev  ## write anew what the smoke run is expected to show (tests/end_to_end/golden)
	DPO_CLI_RENEW_GOLDEN=1 $(TESTING) .venv/bin/python -m pytest tests/end_to_end/test_golden.py

pictures: .venv/installed-dev  ## draw the smoke run's report anew for both READMEs (needs Chromium)
	.venv/bin/dpo-cli train recipes/smoke.yaml --quiet
	.venv/bin/dpo-cli eval recipes/smoke.yaml --quiet --set eval.report_language=en
	.venv/bin/python -m tests.tools.report_picture runs/smoke/eval/report.html recipes/report.png
	.venv/bin/dpo-cli eval recipes/smoke.yaml --quiet --set eval.report_language=zh
	.venv/bin/python -m tests.tools.report_picture runs/smoke/eval/report.html recipes/report.zh.png

test-unsloth: .venv-unsloth/installed  ## what we take Unsloth for, against the package itself; no GPU needed
	$(TESTING) .venv-unsloth/bin/python -m pytest tests/unsloth_real -m "not slow"

lint: .venv/installed-dev  ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/installed-dev  ## the figures of the README, measured here
	@for script in tests/benchmarks/bench_*.py; do echo "== $$script"; OMP_NUM_THREADS=1 .venv/bin/python $$script || exit 1; done

bench-quick: .venv/installed-dev  ## equal numbers and token counts of the training step, in half a minute
	@OMP_NUM_THREADS=1 .venv/bin/python tests/benchmarks/bench_train.py --quick

gpu-check: .venv-gpu/installed  ## what is claimed of a 16 GB card, asked of this one, in calls of ten minutes, offline (ONLY=… for a part, speed for one)
	.venv-gpu/bin/python tests/benchmarks/gpu_check.py $(if $(ONLY),--only $(ONLY))

clean:  ## remove the venvs (runs stay)
	rm -rf .venv .venv-gpu .venv-unsloth

# torch first and alone: asked for together with the rest, pip may take a CUDA build of several gigabytes.
.venv/installed: pyproject.toml
	$(call check,cpu)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python $(INSTALL) $(TORCH_FROM) torch==2.13.0
	.venv/bin/python $(INSTALL) --editable '.[cpu,gguf,judge]'
	touch $@

.venv/installed-dev: .venv/installed
	.venv/bin/python $(INSTALL) --quiet --editable '.[cpu,gguf,judge,serving,dev]'
	.venv/bin/python -c 'import trl, peft; trl.DPOTrainer'  # compiled once, before several tests import it at once
	touch $@

# Unsloth asks for xformers, whose builds often don't fit its torch: then it is only a warning at every start.
.venv-gpu/installed: pyproject.toml
	$(call check,gpu)
	test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	$(if $(TORCH_INDEX),.venv-gpu/bin/python $(INSTALL) $(TORCH_FROM) torch==2.14.1 torchvision)
	.venv-gpu/bin/python $(INSTALL) --editable '.[unsloth,gguf,judge]'
	.venv-gpu/bin/python -c 'import torch, xformers; torch.ops.load_library(xformers.__path__[0] + "/_C.so")' 2>/dev/null || \
	  .venv-gpu/bin/python -m pip uninstall --yes xformers
	touch $@

# Unsloth's trainer and signatures on a machine without a GPU. By itself pip would resolve unsloth to a CUDA torch of
# gigabytes, through its torchvision and xformers; so what its import needs comes first, with the versions that it
# pins, and then Unsloth alone. Triton and Pillow are what unsloth_zoo imports beside that.
.venv-unsloth/installed: pyproject.toml Makefile
	test -x .venv-unsloth/bin/python || $(PYTHON) -m venv .venv-unsloth
	.venv-unsloth/bin/python $(INSTALL) --quiet $(TORCH_FROM) torch==2.13.0
	.venv-unsloth/bin/python $(INSTALL) --quiet --editable . torch==2.13.0 trl==1.15.0 transformers==5.17.0 \
	  datasets==4.8.5 peft==0.21.2 accelerate==1.15.0 bitsandbytes==0.50.2 triton==3.7.0 pillow 'pytest>=8.4' 'pytest-timeout>=2.4'
	.venv-unsloth/bin/python $(INSTALL) --quiet --no-deps unsloth==2026.10.9 unsloth_zoo==2026.10.9
	touch $@
