# Every target sets up .venv by itself (Python 3.11 or newer).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
DEV := .venv/.ready-dev

.PHONY: demo test test-engines check bench clean

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

test: $(DEV)
	$(BIN)/python -m pytest

# A real vLLM on the CPU, and the code of released engines: made once, and again when tests/engines/environment.py or its pins change.
test-engines: $(DEV)
	$(BIN)/python tests/engines/environment.py
	$(BIN)/python -m pytest -m engines tests/engines

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEV)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv .venv-vllm .venv-vllm-wheels dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
