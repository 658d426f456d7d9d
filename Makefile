PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: setup test test-slow

setup: .venv/stamp   ## the virtual environment .venv

.venv/stamp: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt -e '.[test,plot]'
	touch $@

test: setup   ## everything but the slow tests
	$(BIN)/python -m pytest -q -m "not slow" --durations=10

test-slow: setup   ## full-length runs and kill loops
	$(BIN)/python -m pytest -q -m slow --durations=10
