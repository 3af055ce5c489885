# Two commands do everything: `make demo` and `make test`. Both make .venv first if it is not there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart

.PHONY: demo test lint clean

demo: $(VENV)/installed
	REIDCTL=$(BIN)/reidctl REIDCTL_RUN=$(RUN) bash pipelines/quickstart.sh

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -q --durations=15

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade --quiet pip
	$(BIN)/python -m pip install --progress-bar off --constraint .ci/constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
