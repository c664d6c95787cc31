# Everything runs in .venv, which is made on first use, with the first of these that constraints.txt is for: Python 3.11 to
# 3.13. Another interpreter: make test PYTHON=python3.12. The .venv is made anew if the interpreter is not the one before
PYTHON ?= python3.11 python3.12 python3.13 python3
# The interpreter itself, also where .venv is activated
SERVED := import sys; (3, 11) <= sys.version_info < (3, 14) and print(sys._base_executable)
BASE := $(firstword $(foreach name,$(PYTHON),$(shell $(name) -c '$(SERVED)' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt
# What is installed, and by which interpreter
PACKAGE := $(VENV)/package$(subst /,-,$(BASE))
TOOLS := $(VENV)/tools$(subst /,-,$(BASE))
SOURCES := sb3_reinforce tests benchmarks examples
# Small networks: more threads only get in each other's way
export OMP_NUM_THREADS := 1

.PHONY: help install train test test-fast fuzz docs lint type format commit-checks clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-16s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(PACKAGE): pyproject.toml constraints.txt
	@test -n "$(BASE)" || { echo "None of $(PYTHON) is Python 3.11, 3.12 or 3.13, which constraints.txt is for:" \
		"name one with PYTHON=, or install the package without it (Python 3.10: pip install -e .)"; exit 1; }
	@echo "Installing into $(VENV): about 400 MB are downloaded, unless pip has them in its cache (some GB more on Linux," \
		"if the package index serves PyTorch with CUDA: docs/guide/install.md)"
	$(BASE) -m venv $(if $(wildcard $@),,--clear) $(VENV)
	$(PIP_INSTALL) -e .
	touch $@

$(TOOLS): $(PACKAGE)
	$(PIP_INSTALL) -e ".[dev]"
	touch $@

install: $(TOOLS)  ## Install the package, all that is optional, and the developers' tools into .venv

train: $(PACKAGE)  ## Train REINFORCE on InvertedPendulum-v4, evaluate it, draw the learning curve
	$(BIN)/python -m benchmarks.train

test: $(TOOLS)  ## Run the tests
	$(BIN)/python -m pytest

test-fast: $(TOOLS)  ## Run the tests that take no more than seconds
	$(BIN)/python -m pytest -m "not slow and not zoo and not distributed"

fuzz: $(TOOLS)  ## Compare with the slow reference on thousands of random environments (FUZZ_CASES=2000)
	FUZZ_CASES=$${FUZZ_CASES:-2000} $(BIN)/python -m pytest -n 0 tests/test_reference.py

docs: $(TOOLS)  ## Build the documentation into docs/_build/html, and run its notebooks
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

lint: $(TOOLS)  ## Check code, format and the direction of imports
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports

type: $(TOOLS)  ## Check types
	$(BIN)/mypy

format: $(TOOLS)  ## Sort imports and format
	$(BIN)/ruff check --select I --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

commit-checks: lint type  ## What must pass before a commit, besides the tests

clean:  ## Remove .venv and what tools leave behind
	rm -rf $(VENV) build dist docs/_build *.egg-info .hypothesis .coverage .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
