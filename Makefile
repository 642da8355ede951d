# Every target makes what it needs from nothing. VENV, CACHE and PYTHON may be set on the command line.
PYTHON ?= python3
VENV ?= .venv
export LUTHIER_CACHE ?= $(CURDIR)/.cache/luthier
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(wildcard src/luthier/kernels/csrc/*) CMakeLists.txt pyproject.toml

.PHONY: demo test test-slow lint bench fix docs model clean

demo: $(BIN)/.core
	$(BIN)/luthier train --config examples/demo.yaml

test: $(BIN)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(BIN)/.dev model
	$(BIN)/python -m pytest -m "slow or model"

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/make_cli.py --check

fix: $(BIN)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python docs/make_cli.py

# On the example task, or on two files of the same form: make bench TRAIN=train.jsonl VALID=valid.jsonl
TRAIN ?= examples/requests/train.jsonl
VALID ?= examples/requests/valid.jsonl
bench: $(BIN)/.dev model
	$(BIN)/python benchmarks/parity.py --train "$(TRAIN)" --valid "$(VALID)"

# The embedded default model, fetched once into the cache; only slow tests and benchmarks need it beforehand.
model: $(BIN)/.core
	$(BIN)/python -m luthier.models.fetch

clean:
	rm -rf build dist .cache $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip

$(BIN)/.core: $(BIN)/python constraints.txt $(SOURCES)
	$(PIP) --editable .
	@touch $@

$(BIN)/.dev: $(BIN)/.core
	$(PIP) --editable ".[dev,peers]"
	@touch $@
