# Everything sets itself up: `make demo` and `make test` need Python 3.11+ with pip, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TESTS ?= tests

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCK := $(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-annotate

.PHONY: demo federation test test-faults fuzz bench lint types layers lock audit-deps clean

# What is installed is in deploy/*.lock, by hash: the same files on every machine and day.
$(VENV)/installed: pyproject.toml deploy/requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r deploy/requirements.lock
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed deploy/requirements-test.lock
	$(PIP) --require-hashes -r deploy/requirements-test.lock
	touch $@

demo: $(VENV)/installed  ## a federation on the sample images, into runs/demo
	rm -rf runs/demo
	$(BIN)/cytofed simulate --out runs/demo

federation: $(VENV)/installed  ## a coordinator and three labs as processes, docs/deploy.md by itself
	rm -rf runs/federation
	CYTOFED=$(abspath $(BIN))/cytofed deploy/federation.sh runs/federation

test: lint types layers  ## lint, types, layers, tests
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not faults and not slow" -rs $(TESTS)

test-faults: $(VENV)/installed-test  ## the full matrix of kills and cuts
	$(BIN)/python -m pytest -n 3 --dist load -m faults -rs $(TESTS)

fuzz: $(VENV)/installed-test  ## a million hostile documents, messages, objects and requests: a night
	CYTOFED_FUZZ_CASES=1000000 $(BIN)/python -m pytest -n 3 --dist load -m faults tests/attacks/test_fuzz.py

bench: $(VENV)/installed-test  ## every benchmark against its peer, and a table
	$(BIN)/python benchmarks/table.py

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

layers: $(VENV)/installed-test
	$(BIN)/lint-imports

lock: $(VENV)/installed-test  ## after a change of dependencies: the locks and the bill of materials; UPGRADE=--upgrade takes newer releases
	$(LOCK) $(UPGRADE) pyproject.toml -o deploy/requirements.lock
	$(LOCK) $(UPGRADE) -c deploy/requirements.lock --extra test pyproject.toml -o deploy/requirements-test.lock
	sed '/--hash/d; s/ *\\$$//' deploy/requirements.lock | $(BIN)/cyclonedx-py requirements - --pyproject pyproject.toml --output-reproducible --of JSON -o deploy/sbom.cdx.json

audit-deps: $(VENV)/installed-test  ## known vulnerabilities of what a deployment installs; asks pypi.org
	$(BIN)/pip-audit --strict --disable-pip --require-hashes -r deploy/requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info runs
