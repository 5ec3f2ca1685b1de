# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
# Every target makes the environment .venv first, when it is not there or its requirements have changed.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ROOMS := configuration tokenizer modeling_mambaformer pipelines trainer dental_qa hub benchmarks native
# Each benchmark is a module of its own that can be run; the report that gathers their results comes last.
BENCHMARKS = $(filter-out report,$(basename $(notdir $(shell grep -l '__main__' benchmarks/*.py))))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow bench report style

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## make the environment .venv and install the pinned requirements

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard native/*.cpp native/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than 3.10: run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (some minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)  ## answer five dental questions from the embedded model, offline
	@HF_HUB_OFFLINE=1 $(BIN)/mambaformer demo

test: $(STAMP)  ## run the tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

test-slow: $(STAMP)  ## run the tests that take long or need much memory
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow -rs --durations=10

bench: $(STAMP)  ## measure everything again and fill the figures into README.md, model_card.md and docs/
	@set -e; for name in $(BENCHMARKS); do \
		echo "mambaformer.benchmarks.$$name"; $(BIN)/python -m mambaformer.benchmarks.$$name; done
	$(BIN)/python -m mambaformer.benchmarks.report

report: $(STAMP)  ## fill the figures of the last measurement into README.md, model_card.md and docs/
	$(BIN)/python -m mambaformer.benchmarks.report

style: $(STAMP)  ## check style, types and the rules for transformers models
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/typing && mkdir -p build/typing/mambaformer
	@ln -s $(addprefix ../../../,$(wildcard mambaformer/*.py) mambaformer/py.typed $(ROOMS)) build/typing/mambaformer/
	$(BIN)/mypy
	$(BIN)/python .ci/lint_models.py
