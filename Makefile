# Every target makes its own virtual environment first; `make PYTHON=python3.12 …` chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests of ranks wait for each other half of the time: several files at once. Off: `make SIDE_BY_SIDE= test`.
SIDE_BY_SIDE ?= -n 3 --dist loadfile
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check bench-foundation bench-engine clean

help:
	@echo "make demo              distil a small real graph, print the result table"
	@echo "make test              all tests but the long ones"
	@echo "make test-all          all tests"
	@echo "make check             formatting, lint, types"
	@echo "make bench-foundation  the measurements behind the README's table"
	@echo "make bench-engine      what the sharded engine sends, holds and survives"
	@echo "make clean             remove caches and the demo's run, keep other runs and the virtual environment"

# Installed once, and again when a dependency changed. The stamp is written last: a broken-off install is repeated.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "distkgd needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "installing into $(VENV), once; this takes a minute or more"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# The demo owns runs/demo and starts afresh each time; runs of other names are never touched.
demo: $(STAMP)
	rm -rf runs/demo
	$(BIN)/python launch/distill.py --out runs/demo
	@echo
	@echo "To see the curves: $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db   (then open http://127.0.0.1:5000)"

test: $(STAMP)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

test-all: $(STAMP)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

check: $(STAMP)
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

bench-foundation: $(STAMP)
	$(BIN)/python benchmarks/foundation.py demo
	$(BIN)/python benchmarks/foundation.py reading
	$(BIN)/python benchmarks/foundation.py quoted
	$(BIN)/python benchmarks/foundation.py wn18rr

bench-engine: $(STAMP)
	for task in memory traffic speed scale project; do $(BIN)/python benchmarks/engine.py $$task || exit 1; done
	$(BIN)/python benchmarks/zero3.py compare
	$(BIN)/python benchmarks/kills.py
	$(BIN)/python benchmarks/two_launchers.py

clean:
	rm -rf runs/demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
