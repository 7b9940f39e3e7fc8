# Everything here needs Python 3.10 or later, make, and a Python package index. `make` alone says what there is.

PYTHON ?= python3
VENV ?= .venv
LOWEST_VENV ?= .venv-lowest
# More for pip, e.g. PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" for torch without CUDA
PIP_ARGS ?=
# For `make lowest`, another torch than the oldest allowed, e.g. LOWEST_TORCH=2.13.0 where only that one can be had
LOWEST_TORCH ?=
# More for pytest, e.g. ARGS="-k greedy -x"
ARGS ?=
# Test files that run at a time: one a core, at most 4, as each takes some GB; 0 for one after another, as --pdb needs
JOBS ?= auto

BIN := $(VENV)/bin
PARALLEL = --numprocesses $(JOBS) --maxprocesses 4 --dist loadfile
# Compiling all of torch at once takes longer than compiling what gets imported
INSTALL = -m pip install --quiet --no-compile --disable-pip-version-check $(PIP_ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test unit check format lowest docs clean

help: ## Show this
	@awk 'BEGIN { FS = ":.*## " } /^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.dev ## Install shallower and its development tools into .venv, at pinned versions

demo: $(VENV)/.demo ## Remove a fifth of a real 135M model's blocks, and show what it cost
	$(BIN)/shallower demo --force

test: $(VENV)/.dev ## All tests; none needs a model hub or a GPU (ARGS="-k name" for some)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

unit: $(VENV)/.dev ## The tests that need no model download
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not model" $(ARGS)

check: $(VENV)/.dev ## Format, lint, types, and which way imports go
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/check_imports.py

format: $(VENV)/.dev ## Format, and fix what the linter can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

lowest: $(LOWEST_VENV)/.lowest ## The unit tests with the oldest versions that pyproject.toml allows
	@# old libraries warn of new ones: here warnings are no errors
	OMP_NUM_THREADS=1 $(LOWEST_VENV)/bin/python -m pytest $(PARALLEL) -W default -m "not model" $(ARGS)

docs: $(VENV)/.dev ## Write the pages that are made from the code: docs/cli.md, docs/api.md
	$(BIN)/python tools/make_cli_reference.py
	$(BIN)/python tools/make_api_reference.py

clean: ## Remove the environments and all caches
	rm -rf $(VENV) $(LOWEST_VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "shallower needs Python 3.10 or later, this is " \
	  + sys.version.split()[0] + ": give another with make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints-dev.txt | $(VENV)/bin/pip
	@echo "Installing shallower into $(VENV): a few minutes the first time."
	$(BIN)/python $(INSTALL) -c constraints-dev.txt -e '.[gguf,data,eval]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints-dev.txt | $(VENV)/bin/pip
	@echo "Installing shallower and its development tools into $(VENV): a few minutes the first time."
	$(BIN)/python $(INSTALL) -c constraints-dev.txt -e '.[dev,datatrove]'
	@touch $(VENV)/.demo $@

$(LOWEST_VENV)/.lowest: pyproject.toml
	$(PYTHON) -m venv $(LOWEST_VENV)
	grep -oE '"[A-Za-z0-9_.-]+>=[0-9.]+"' pyproject.toml | grep -v setuptools | sort -u \
	  | sed -E 's/"//g; s/>=/==/; $(if $(LOWEST_TORCH),s/^torch==.*/torch==$(LOWEST_TORCH)/)' > $(LOWEST_VENV)/constraints.txt
	@# without datatrove, which needs newer numpy and huggingface_hub than shallower does
	$(LOWEST_VENV)/bin/python $(INSTALL) -c $(LOWEST_VENV)/constraints.txt -e '.[dev]'
	@touch $@
