# Every target makes its own virtual environment: a clone, Python >= 3.11, pip and make are enough.
PYTHON ?= python3
VENV ?= .venv
JAX ?=
JOBS ?= 2
PYTEST_ARGS ?=
AOT_ARGS ?=

BIN = $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n $(JOBS)
export PYTHON JAX

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all lint bench aot docs clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "PYTHON=python3.13  another interpreter (now: $(PYTHON))"
	@echo "JAX=0.10.2         another jax (now: $(or $(JAX),the newest that fits))"
	@echo "VENV=.venv-a       another environment (now: $(VENV))"
	@echo "PYTEST_ARGS=...    more arguments for pytest"
	@echo "AOT_ARGS=...       other arguments for tools.aot: --only NAME --dump FOLDER"

demo:  ## quantize, run, tune and save a real language model; writes demo-out/
	@tools/venv.sh $(VENV) demo
	$(BIN)/python -m examples.tinylm.demo

test:  ## the tests that take a few minutes
	@tools/venv.sh $(VENV) test
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all:  ## every test, and 2,000 random terms for each property
	@tools/venv.sh $(VENV) test
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
	@for name in cpu_matmul gradient_memory quantize_speed; do \
		$(BIN)/python -m benchmarks.$$name --json benchmarks/results/$$name.json || exit 1; done

# An environment of its own: where jax finds its CUDA plugin and no driver, it says so at each start.
aot:  ## every GPU kernel compiled for an H100, without one; writes the table of docs/kernels.md
	@tools/venv.sh $(VENV)-aot aot
	$(VENV)-aot/bin/python -m tools.aot $(or $(AOT_ARGS),--write docs/kernels.md)

docs:  ## the pages of docs/, every output in them made on the way; writes docs/_build/html
	@tools/venv.sh $(VENV) docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:  ## remove environments, builds, caches and what the demo and the docs wrote
	rm -rf .venv .venv-* build dist *.egg-info demo-out docs/_build docs/api
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
