# Everything runs in .venv, which is made on first use. Another interpreter: make test PYTHON=python3.12
# constraints.txt needs Python 3.11 or newer
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
SOURCES := sb3_reinforce tests benchmarks
# Small networks: more threads only get in each other's way
export OMP_NUM_THREADS := 1

.PHONY: help install train test fuzz lint type format commit-checks clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-16s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed  ## Install the package and its tools into .venv

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt -e ".[dev]"
	touch $@

train: install  ## Train REINFORCE on InvertedPendulum-v4, evaluate it, draw the learning curve
	$(BIN)/python -m benchmarks.train

test: install  ## Run the tests
	$(BIN)/python -m pytest

fuzz: install  ## Compare with the slow reference on thousands of random environments (FUZZ_CASES=2000)
	FUZZ_CASES=$${FUZZ_CASES:-2000} $(BIN)/python -m pytest -n 0 tests/test_reference.py

lint: install  ## Check code and format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

type: install  ## Check types
	$(BIN)/mypy

format: install  ## Sort imports and format
	$(BIN)/ruff check --select I --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

commit-checks: lint type  ## What must pass before a commit, besides the tests

clean:  ## Remove .venv and what tools leave behind
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
