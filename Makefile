# Every target does its own set-up: .venv is made once, and again only where pyproject.toml or Python changed.
# Written for GNU make 3.81 and later, so that the make of macOS runs it.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
endif

PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
CORE := $(VENV)/.core-installed
DEV := $(VENV)/.dev-installed
BENCHES = $(filter-out bench/measure.py bench/works.py bench/feeding.py bench/transferring.py,$(wildcard bench/*.py))

.PHONY: help setup train test torture check bench preflight-score format clean
.NOTPARALLEL:

help:
	@echo "make train    train the example recipe on real data (examples/digits)"
	@echo "make test     run all tests"
	@echo "make torture  kill runs, fill and break disks, cut the power; figures go to bench/results"
	@echo "make check    ruff, format, strict types, the laws"
	@echo "make bench    run every benchmark; results go to bench/results"
	@echo "make preflight-score  how many planted mistakes preflight finds, and how many right trainings it blames"
	@echo "make format   put the source into the one form"
	@echo "make setup    make .venv with all that the tests use"
	@echo "make clean    remove caches; .venv and runs stay"

train: $(CORE)
	@$(BIN)/torchkeep train examples/digits/recipe.toml $(ARGS)

setup: $(DEV)

test: $(DEV)
	@$(BIN)/python -m pytest tests --ignore=tests/torture $(ARGS)

torture: $(DEV)
	@$(BIN)/python -m pytest tests/torture $(ARGS)

check: $(DEV)
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy
	@$(BIN)/python -m pytest tests/laws

bench: $(DEV)
	@for file in $(BENCHES); do $(BIN)/python $$file || exit 1; done

preflight-score: $(DEV)
	@$(BIN)/python bench/preflight.py

format: $(DEV)
	@$(BIN)/python -m ruff check --fix --quiet . || true
	@$(BIN)/python -m ruff format .

clean:
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	@find src tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +

# A python that is missing, or a link to one that went away, starts the folder anew: its packages went with it.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Torchkeep needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(CORE): pyproject.toml $(BIN)/python
	@echo "Installing torchkeep into $(VENV), once (PyTorch is large: some minutes where pip has not cached it)"
	@$(PIP) -e .
	@touch $@

$(DEV): pyproject.toml $(BIN)/python
	@echo "Installing torchkeep and its tests' tools into $(VENV), once (PyTorch is large: some minutes where pip has not cached it)"
	@$(PIP) -e '.[dev]'
	@touch $(CORE) $@
