# `make help` lists what there is to do.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format clean

PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# An index of torch's CPU builds, asked where pip's own indexes have none: make demo TORCH_INDEX=<address>
TORCH_INDEX ?=

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Build .venv with the pinned set for CPU (again only when requirements change)

demo: setup  ## Set up, then run every stage on the public data set and write the report
	$(VENV)/bin/adsid run experiment=quickstart

test: lint  ## Set up, then lint, types, import contract and tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --durations=15

lint: setup  ## Lint, types and import contract only
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy .
	$(VENV)/bin/lint-imports

format: setup  ## Format the code and mend what the linter can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## Remove .venv, caches and builds (runs are kept)
	rm -rf $(VENV) build *.egg-info .ruff_cache .mypy_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A setup that was killed leaves $(VENV)/.unfinished behind, and half-written packages: then it starts anew.
$(STAMP): requirements/cpu.txt pyproject.toml
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) not found: install Python 3.11, or name one with make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "$(PYTHON) is not Python 3.11: name one with make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@if [ -e $(VENV)/.unfinished ] || ! $(PY) -m pip --version > /dev/null 2>&1; then rm -rf $(VENV); $(PYTHON) -m venv $(VENV); fi
	@touch $(VENV)/.unfinished
	@rm -f $(STAMP)
	@torch=$$(sed -n 's/^torch==//p' requirements/cpu.txt); \
	$(PY) -m pip install --no-deps --quiet "torch==$$torch+cpu" 2> $(VENV)/.torch.log \
	|| { test -n "$(TORCH_INDEX)" && $(PY) -m pip install --no-deps --index-url "$(TORCH_INDEX)" "torch==$$torch+cpu"; } \
	|| echo "no CPU build of torch $$torch found; taking the index's own build"
	$(PY) -m pip install --no-deps --no-warn-script-location -r requirements/cpu.txt
	$(PY) -m pip install --no-deps --no-build-isolation --editable .
	@$(PY) -c 'import torch, torchrec, fbgemm_gpu, faiss, lightning, transformers, peft, polars, hydra, cli'
	@rm $(VENV)/.unfinished && touch $(STAMP)
