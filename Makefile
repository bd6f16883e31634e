# Every target makes its own virtual environment first; `make PYTHON=python3.12 …` chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests of ranks wait for each other half of the time: several files at once. Off: `make SIDE_BY_SIDE= test`.
SIDE_BY_SIDE ?= -n 3 --dist loadfile --no-loadscope-reorder
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-oldest check site house resolve bench-foundation bench-engine clean

help:
	@echo "make demo              distil a small real graph, print the result table"
	@echo "make test              all tests but the long ones"
	@echo "make test-all          all tests"
	@echo "make test-oldest       the core and the kernels with the oldest torch that is allowed; try PYTHON=python3.12"
	@echo "make check             formatting, lint, types"
	@echo "make site              the documentation as a site, in site/"
	@echo "make house             the layout in numbers; fails when a limit is broken"
	@echo "make resolve           whether constraints.txt can be installed with torch's CUDA build and its CPU build"
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

# torch brings its own triton, if any; everything else is as pinned.
OLDEST := .venv-oldest
test-oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	grep -v -e '^torch==' -e '^triton==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt 'torch==2.11.*' -e . \
		pytest pytest-timeout pytest-xdist hypothesis jaxtyping packaging psutil
	$(OLDEST)/bin/python -m pytest $(SIDE_BY_SIDE) -m "not slow" tests/kernels tests/distributed tests/scorers \
		tests/methods/test_losses.py tests/training/test_train.py tests/evaluation/test_evaluate.py tests/pipeline/test_plan.py tests/evaluation/test_predict.py

check: $(STAMP)
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# Reads metadata alone, which needs a pip newer than some Pythons bring. What no index here has is said, not guessed.
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
RESOLVER := $(VENV)/resolver/bin/python -m pip
RESOLVE := $(RESOLVER) install --quiet --dry-run --ignore-installed
resolve:
	test -x $(VENV)/resolver/bin/python || $(PYTHON) -m venv $(VENV)/resolver
	$(RESOLVER) install --quiet 'pip>=24'
	@checked=; for build in CUDA: CPU:+cpu; do \
		torch="torch===$(TORCH)$${build#*:}"; what="$${build%%:*} build, $$torch"; \
		if $(RESOLVE) --no-deps "$$torch"; then \
			$(RESOLVE) -c constraints.txt "$$torch" '.[dev,bench]' || exit 1; \
			echo "$$what: constraints.txt resolves"; checked=yes; \
		else echo "$$what: not checked, for the reason above"; fi; \
	done; test -n "$$checked"

site: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

house: $(STAMP)
	$(BIN)/python benchmarks/house.py

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
	rm -rf runs/demo build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
