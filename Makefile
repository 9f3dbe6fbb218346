# Everything lives in .venv. `make setup` makes it; every other target makes it first where it is missing or stale.
#   make demo PYTHON=python3.12     another interpreter for a new .venv
#   make test PYTEST="-k report"    options for pytest
#   make quality QUALITY="--seeds 1"   options for benchmarks.quality

PYTHON ?= python3
PYTEST ?=
QUALITY ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
JOBS := $(shell nproc 2>/dev/null || echo 2)

.PHONY: setup demo test lint bench quality aot clean

setup: $(STAMP)

# torch comes first, and the package is built without isolation, so that the C++ kernels match the torch they run with.
$(STAMP): pyproject.toml constraints.txt peers.txt setup.py $(wildcard kernels/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "cpc_fast needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	  "Name another one: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV): minutes the first time, most of them for torch."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }
	@$(PIP) 'setuptools>=77' wheel ninja
	@$(PIP) torch==2.13.0
	@PATH="$(abspath $(BIN)):$$PATH" MAX_JOBS=$(JOBS) $(PIP) --no-build-isolation --editable '.[dev]'
	@$(PIP) --no-deps --requirement peers.txt
	@touch $@

demo: $(STAMP)
	@$(BIN)/cpc-fast demo --out runs/demo

# One thread in each of the two pytest processes: more would only fight over the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --benchmark-disable $(PYTEST)
	@echo "All tests passed. Open next: tests/ mirrors the tree; \`make demo\` writes runs/demo/report.html."

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks --benchmark-only
	$(BIN)/python -m benchmarks.report

# Hours on a CPU; it says how many, and goes on where it was stopped.
quality: $(STAMP)
	$(BIN)/python -m benchmarks.quality $(QUALITY)

# Minutes the first time, seconds after: ~/.cache/cpc_fast/aot remembers what was compiled.
aot: $(STAMP)
	$(BIN)/python -m benchmarks.aot

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks kernels/cpc_kernels/_cpu*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
