# Every target makes its own virtual environment: a clone, Python >= 3.11, pip and make are enough.
PYTHON ?= python3
VENV ?= .venv
JAX ?=
JOBS ?= 2
PYTEST_ARGS ?=
AOT_ARGS ?=
PART ?= 1/1
GPU_TESTS ?= tests/gpu

BIN = $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n $(JOBS)
# `make test-all` compiles as users do.
QUICKLY = XLA_FLAGS="$$($(BIN)/python tools/quick_xla.py) $$XLA_FLAGS"
export PYTHON JAX

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all lint bench aot aot-ampere gpu gpu-peers docs clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "PYTHON=python3.13  another interpreter (now: $(PYTHON))"
	@echo "JAX=0.10.2         another jax (now: $(or $(JAX),the newest that fits))"
	@echo "VENV=.venv-a       another environment (now: $(VENV))"
	@echo "PYTEST_ARGS=...    more arguments for pytest"
	@echo "PART=2/3           of what make gpu and gpu-peers time (now: $(PART)); GPU_TESTS= leaves its tests out"
	@echo "AOT_ARGS=...       other arguments for tools.aot: --only NAME --dump FOLDER"

demo:  ## quantize, run, tune and save a real language model; writes demo-out/
	@tools/venv.sh $(VENV) demo
	$(BIN)/python -m examples.tinylm.demo

test:  ## the tests that take a few minutes
	@tools/venv.sh $(VENV) test
	$(QUICKLY) $(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all:  ## every test, and 2,000 random terms for each property
	@tools/venv.sh $(VENV) test
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[live]" || \
		echo "no torch here: nothing is compared with transformers, compressed-tensors and aqlm live"
	@for packer in auto_gptq==0.7.1 autoawq==0.2.7; do \
		[ -e $(VENV)/packers/$${packer%==*}-$${packer#*==}.dist-info ] || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --no-deps \
			--target $(VENV)/packers $$packer || echo "$$packer was not installed: its packer is not run"; done
	$(PYTEST) --examples 2000 $(PYTEST_ARGS)

lint:  ## ruff, mypy, import floors, names, sizes
	@tools/venv.sh $(VENV) lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_names.py
	$(BIN)/python tools/check_sizes.py

bench:  ## time everything in benchmarks/ on this machine; writes benchmarks/results/
	@tools/venv.sh $(VENV) bench
	@for name in cpu_matmul gradient_memory quantize_speed generate load_memory; do \
		$(BIN)/python -m benchmarks.$$name --json benchmarks/results/$$name.json || exit 1; done

# An environment of its own: where jax finds its CUDA plugin and no driver, it says so at each start.
aot:  ## every GPU kernel compiled for an H100, without one; writes the table of docs/kernels.md
	@tools/venv.sh $(VENV)-aot aot
	$(VENV)-aot/bin/python -m tools.aot --jobs $(JOBS) $(or $(AOT_ARGS),--write docs/kernels.md)

aot-ampere:  ## the same for an A100 and an RTX 4090, whose kernels need jax 0.12 and so Python >= 3.12
	@JAX=0.12 tools/venv.sh $(VENV)-aot-ampere aot
	$(VENV)-aot-ampere/bin/python -m tools.aot --jobs $(JOBS) --chip a100 $(or $(AOT_ARGS),--write docs/kernels.md)
	$(VENV)-aot-ampere/bin/python -m tools.aot --jobs $(JOBS) --chip rtx4090 $(or $(AOT_ARGS),--write docs/kernels.md)

# With the Python of the machine and what that has: one with a GPU may have no network. The tests' own warnings are errors
# elsewhere; here they may be those of other versions. In all less than 9 minutes, whatever hangs.
gpu:  ## on an H100 or H200: tests/gpu, then the kernels timed; writes benchmarks/results/
	@$(PYTHON) -m benchmarks.needs
	@start=$$(date +%s); left() { echo $$((start + $$1 - $$(date +%s))); }; failed=0; \
	if [ -n "$(GPU_TESTS)" ]; then XLA_PYTHON_CLIENT_PREALLOCATE=false PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 timeout 240 \
		$(PYTHON) -m pytest -p xdist.plugin -n 6 -p no:cacheprovider -W default $(GPU_TESTS) || failed=1; fi; \
	timeout 120 $(PYTHON) -m benchmarks.gpu_micro || failed=1; \
	timeout 120 $(PYTHON) -m benchmarks.gpu_step || failed=1; \
	timeout $$(left 530) $(PYTHON) -m benchmarks.gpu_matmul $(PART) --seconds $$(left 490) || failed=1; \
	exit $$failed

# Contenders that are not installed are named in the results. A run that is cut off goes on where it stopped.
gpu-peers:  ## on an H100 or H200: lowbit beside other libraries; writes benchmarks/results/
	@$(PYTHON) -m benchmarks.needs
	@timeout 540 $(PYTHON) -m benchmarks.peers $(PART) --seconds 500

# Pages import the examples.
docs:  ## the pages of docs/, every output in them made on the way; writes docs/_build/html
	@tools/venv.sh $(VENV) docs
	PYTHONPATH=$(CURDIR) $(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:  ## remove environments, builds, caches and what the demo and the docs wrote
	rm -rf .venv .venv-* build dist *.egg-info demo-out docs/_build docs/api
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
