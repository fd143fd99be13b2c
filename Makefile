# Each target sets up .venv by itself, once; all it needs is Python 3.11 to 3.13 and PyPI.
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu    takes the small CPU build of torch
PYTHON ?= python3
TORCH_INDEX ?=

BIN := .venv/bin
READY := .venv/.ready
TESTABLE := .venv/.testable
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test test-fast lint

quickstart: $(READY)
	$(BIN)/mpformer quickstart

# file by file: files of few tests take the longest, and of itself xdist would begin with the others
IN_ORDER := --dist loadfile --no-loadscope-reorder

# the end-to-end tests mostly wait for processes: they run beside the others, and their report comes last
test: lint
	@$(BIN)/python -m pytest tests/e2e > .e2e.log 2>&1 & e2e=$$!; \
	$(BIN)/python -m pytest -n 2 $(IN_ORDER) tests/test_wheel.py tests --ignore=tests/e2e; others=$$?; \
	wait $$e2e; failed=$$?; cat .e2e.log; exit $$((others | failed))

test-fast: lint
	$(BIN)/python -m pytest -n 2 $(IN_ORDER) -m "not slow"

lint: $(TESTABLE)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "mpformer needs Python 3.11 to 3.13: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) --editable .
	@touch $@

$(TESTABLE): $(READY)
	$(PIP) --editable '.[dev]'
	@touch $@
