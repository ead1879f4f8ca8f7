# Everything sets itself up: `make demo` and `make test` need Python 3.11+ with pip, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TESTS ?= tests

.PHONY: demo federation test test-faults bench lint types layers clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

demo: $(VENV)/installed  ## a federation on the sample images, into runs/demo
	rm -rf runs/demo
	$(BIN)/cytofed simulate --out runs/demo

federation: $(VENV)/installed  ## a coordinator and three labs as processes, docs/deploy.md by itself
	rm -rf runs/federation
	CYTOFED=$(abspath $(BIN))/cytofed deploy/federation.sh runs/federation

test: lint types layers  ## lint, types, layers, tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not faults and not slow" -rs $(TESTS)

test-faults: $(VENV)/installed-test  ## the full matrix of kills and cuts
	$(BIN)/python -m pytest -n 2 --dist load -m faults -rs $(TESTS)

bench: $(VENV)/installed-test  ## every benchmark against its peer, and a table
	$(BIN)/python benchmarks/table.py

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

layers: $(VENV)/installed-test
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info runs
