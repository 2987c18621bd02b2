# make run     one command from a fresh clone to a trained controller
# make check   everything a change must pass; .ci/run runs the same
# make help    the rest
#
# Needs Python >= 3.11 (another one: make PYTHON=python3.12 …), git and make. Everything lives in .venv.

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# uv keeps its cache in the user's home; without a home it stays beside the environment.
export UV_CACHE_DIR ?= $(if $(HOME),$(HOME)/.cache/uv,$(CURDIR)/$(VENV)/.uv-cache)

.DEFAULT_GOAL := help
.PHONY: help setup run test prove check lint types layers format bench clean lock

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## prepare .venv: exact, hashed versions of everything, then this project

# The installer itself is taken from the lock too, by its hash.
$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Simic needs Python >= 3.11, this is %d.%d: name a newer one with make PYTHON=..." % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "no virtual environment could be made; on Debian install python3-venv" >&2; exit 1; }
	@awk '/^[^ ]/ { keep = /^uv==/ } keep' requirements.lock > $(VENV)/installer.txt
	@test -x $(BIN)/pip || $(BIN)/python -m ensurepip --upgrade > /dev/null
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(VENV)/installer.txt
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --require-hashes --requirement requirements.lock
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

run: setup  ## train on digits, evaluate, print the table (ARGS='--max-seconds 60' …)
	$(BIN)/simic-supervisor run --preset digits $(ARGS)

check: lint types layers test  ## format, lint, types, layers, tests with coverage

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

layers: setup
	$(BIN)/lint-imports --no-logo

test: setup  ## tests with the coverage gates; for some of them call .venv/bin/pytest itself
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses $(WORKERS) --dist loadfile
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	$(BIN)/coverage json --quiet
	$(BIN)/python -m tests.coverage_gate

prove: setup  ## the long proofs, about an hour: every fault point, chaos, lockstep, replay, power cuts; tables in build/prove.md
	rm -f build/prove.md
	SIMIC_PROVE=1 SIMIC_PROVE_OUT=$(CURDIR)/build/prove.md $(BIN)/pytest -v tests/prove $(wildcard tests/system/test_power_cuts.py)
	@cat build/prove.md

format: setup  ## put every file into the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## every benchmark, one JSON line each (ARGS='journal --record')
	$(BIN)/python -m bench $(ARGS)

lock: setup  ## choose versions anew; changes requirements.lock
	$(BIN)/uv pip compile --quiet --upgrade --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
		--extra dev pyproject.toml --output-file requirements.lock

clean:  ## remove what was made here, except runs/
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage .coverage.* .coverage-report.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
