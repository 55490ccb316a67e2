# make demo: the main job on phantoms.  make test: lint, types, fast tests.  make slow: the minutes-long ones.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Libraries may set another locale while the tests run; files and pipes stay UTF-8.
export PYTHONUTF8 := 1

.PHONY: demo env format lint slow test

demo: $(STAMP)
	$(BIN)/segvol-pl demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow"

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@
