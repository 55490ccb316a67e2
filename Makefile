# make demo: the main job on phantoms.  make test: lint, types, fast tests.  make slow: the minutes-long ones.
# make gpu: those that need a CUDA device; without one they are skipped.
# make coverage: the fast tests, and the lines of code that they never ran.
# make ladder: the worked example of scaling laws on phantoms, see docs/explanation/scaling.md; takes 76 minutes.
# make docs: the pages, into site/.  make wheel: into dist/.
# make wheelhouse PYTHON=3.12 PLATFORM=manylinux_2_28_x86_64: what a machine without a package index lacks, see docs/how-to/air-gapped.md.
# make lowest: the fast tests with the lowest versions that pyproject.toml allows (Python 3.11).
# make newest: the fast tests with the newest versions that pyproject.toml allows.
# make image PYTHON=python3.12: the fast tests with what images for GPUs hold.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := build/lowest
NEWEST := build/newest
IMAGE := build/image
# Where images for GPUs differ from constraints.txt.
IMAGE_HAS := huggingface_hub==1.33.0 numpy==2.5.2 torch==2.11.0 transformers==5.17.0 triton==3.6.0

# Compiled on all cores at once, which pip does not: without, each start takes 10 s more where Python writes no bytecode,
# as in many containers. Some packages carry templates that do not compile, and much that is never imported.
INSTALL := install --quiet --disable-pip-version-check --no-compile
UNUSED := /(tests?|networkx|fontTools)/|/transformers/(pipelines|models/(?!auto|clip))
compile = $(1)/bin/python -m compileall -qq -j 0 -x '$(UNUSED)' $(1)/lib || true

# What a machine with torch, lightning, transformers, numba and scipy lacks to train. CARRY names more.
WHEELHOUSE ?= build/wheelhouse
PLATFORM ?= manylinux_2_28_$(shell uname -m)
CARRIED := blosc2 braceexpand monai ndindex nibabel numexpr omegaconf webdataset xxhash
CARRY ?=

# A file is one process's, because its tests share what they set up. tests/conftest.py says which files begin first.
FILES := --dist loadfile --no-loadscope-reorder
FAST := -m pytest -m "not slow and not gpu" -n 2 $(FILES)

# Libraries may set another locale while the tests run; files and pipes stay UTF-8.
export PYTHONUTF8 := 1

.PHONY: coverage demo docs env format gpu image ladder lint lowest newest slow test wheel wheelhouse

demo: $(VENV)/.runs
	$(BIN)/segvol-pl demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(FAST)

coverage: env
	OMP_NUM_THREADS=1 $(BIN)/python $(FAST) --cov --cov-report=term

slow: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu" -n 2 $(FILES) --durations=40

gpu: env
	$(BIN)/python -m pytest -m gpu --durations=20

lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python $(FAST)

newest: $(NEWEST)/.installed
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python $(FAST)

image: $(IMAGE)/.installed
	OMP_NUM_THREADS=1 $(IMAGE)/bin/python $(FAST)

ladder: $(VENV)/.runs
	$(BIN)/python benchmarks/ladder.py

docs: env
	$(BIN)/mkdocs build --quiet

wheel: env
	$(BIN)/python -m hatchling build -t wheel

# pip takes a wheel for one name of a platform alone: those of older glibc run on it too. The versions are the tested ones.
wheelhouse: minor = $(word 3,$(subst _, ,$(PLATFORM)))
wheelhouse: machine = $(PLATFORM:manylinux_2_$(minor)_%=%)
wheelhouse: older = $(foreach each,$(shell seq 17 $(minor)),manylinux_2_$(each)_$(machine))
wheelhouse: python = $(or $(filter 3.%,$(PYTHON)),$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
wheelhouse:
	$(if $(filter manylinux_2_%,$(PLATFORM)),,$(error PLATFORM=$(PLATFORM): give manylinux_2_N_MACHINE, N of glibc 2.N))
	rm -rf $(WHEELHOUSE)
	@python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest $(WHEELHOUSE) \
		--python-version $(python) $(addprefix --platform ,$(older) manylinux2014_$(machine)) \
		$(foreach name,$(CARRIED) $(CARRY),"$(or $(shell grep -i '^$(name)==' constraints.txt),$(name))")
	python3 -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(WHEELHOUSE) .
	du -ch $(WHEELHOUSE)/*.whl

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

$(NEWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip $(INSTALL) --editable ".[dev]"
	$(call compile,$(NEWEST))
	touch $@

$(IMAGE)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(IMAGE)
	grep -iv $(foreach each,$(IMAGE_HAS),-e '^$(firstword $(subst ==, ,$(each)))==') constraints.txt >$(IMAGE)/constraints.txt
	printf '%s\n' $(IMAGE_HAS) >>$(IMAGE)/constraints.txt
	$(IMAGE)/bin/pip $(INSTALL) --constraint $(IMAGE)/constraints.txt --editable ".[dev]"
	$(call compile,$(IMAGE))
	touch $@
