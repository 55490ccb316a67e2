# make demo: the main job on phantoms.  make test: lint, types, fast tests.  make slow: the minutes-long ones.
# make gpu: those that need a CUDA device; without one they are skipped.
# make coverage: the fast tests, and the lines of code that they never ran.
# make docs: the pages, into site/.  make wheel: into dist/.
# make lowest: the fast tests with the lowest versions that pyproject.toml allows (Python 3.11).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := build/lowest

# Compiled on all cores at once, which pip does not: without, each start takes 10 s more where Python writes no bytecode,
# as in many containers. Some packages carry templates that do not compile.
INSTALL := install --quiet --disable-pip-version-check --no-compile
compile = $(1)/bin/python -m compileall -qq -j 0 $(1)/lib || true

FAST := -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

# Libraries may set another locale while the tests run; files and pipes stay UTF-8.
export PYTHONUTF8 := 1

.PHONY: coverage demo docs env format gpu lint lowest slow test wheel

demo: $(VENV)/.runs
	$(BIN)/segvol-pl demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(FAST)

coverage: env
	OMP_NUM_THREADS=1 $(BIN)/python $(FAST) --cov --cov-report=term

slow: env
	$(BIN)/python -m pytest -m "slow and not gpu" --durations=20

gpu: env
	$(BIN)/python -m pytest -m gpu --durations=20

lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python $(FAST)

docs: env
	$(BIN)/mkdocs build --quiet

wheel: env
	$(BIN)/python -m hatchling build -t wheel

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: $(VENV)/.develops

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What users run; an environment for development has it already.
$(VENV)/.runs: pyproject.toml constraints.txt | $(BIN)/python
	test -e $(VENV)/.develops || $(BIN)/pip $(INSTALL) --constraint constraints.txt --editable .
	$(call compile,$(VENV))
	touch $@

$(VENV)/.develops: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip $(INSTALL) --constraint constraints.txt --editable ".[dev]"
	$(call compile,$(VENV))
	touch $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip $(INSTALL) --constraint constraints-lowest.txt --editable ".[dev]"
	$(call compile,$(LOWEST))
	touch $@
