# Every target sets up .venv by itself (Python 3.11 or newer).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
DEV := .venv/.ready-dev

JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
LOWEST := .venv-lowest

.PHONY: demo docs test test-all test-lowest test-engines check hooks bench clean

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	$(BIN)/moeplan compare embedded --nodes 4 --gpus-per-node 4 --strategies linear,eplb,paper,moeplan --folds 1 --steps 1 > /dev/null  # compiles the loops, once
	touch $(READY)

$(DEV): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(DEV)

demo: $(READY)
	$(BIN)/moeplan demo

# The documentation site, into site/: strict (a dead link fails), without network.
docs: $(DEV)
	$(BIN)/python docs/command_line.py
	$(BIN)/zensical build --strict --clean

# The fast lane, for every change: all but the tests marked slow, and those that need an engine.
test: $(DEV)
	$(PYTEST) -n $(JOBS) -m "not slow and not engines"

# All but those that need an engine, with the coverage of lines.
test-all: $(DEV)
	$(PYTEST) -n $(JOBS) --cov --cov-report=term

# The fast lane with the lowest version of each dependency that pyproject.toml allows.
test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) .ci/lowest.py > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c $(LOWEST)/lowest.txt
	OMP_NUM_THREADS=1 NUMBA_CACHE_DIR=$(LOWEST)/numba $(LOWEST)/bin/python -m pytest -n $(JOBS) -m "not slow and not engines"

# A real vLLM on the CPU, and the code of released engines: made once, and again when tests/engines/environment.py or its pins change.
test-engines: $(DEV)
	$(BIN)/python tests/engines/environment.py
	$(BIN)/python -m pytest -m engines tests/engines

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Runs ruff, mypy, import-linter and the smoke test before each commit (.pre-commit-config.yaml).
hooks: $(DEV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check prek
	$(BIN)/prek install

bench: $(DEV)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv .venv-lowest .venv-vllm .venv-vllm-wheels dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
