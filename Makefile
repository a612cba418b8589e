# One command each, from a fresh clone. They set up .venv first and skip that when it is done.
#   make train ARGS="run.steps=20 optim.lr=1e-5"      make test ARGS="-k advantages"      make setup PYTHON=python3.12
BIN := .venv/bin
RECIPE ?= r1_zero_arithmetic
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev train test test-full check clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## make .venv, for the CPU or the GPU of this machine
	@bash scripts/setup.sh

setup-dev:
	@bash scripts/setup.sh dev

train: setup  ## train RECIPE (default: r1_zero_arithmetic) with the overrides in ARGS
	@$(BIN)/grpo train $(RECIPE) $(ARGS)

test: setup-dev  ## the tests, all but those of many minutes
	@$(BIN)/python -m pytest --durations=10 $(ARGS)

test-full: setup-dev  ## every test
	@$(BIN)/python -m pytest -m "" --durations=20 $(ARGS)

check: setup-dev  ## style, types and the arrows between the modules
	@$(BIN)/ruff check .
	@$(BIN)/mypy -p grpo
	@$(BIN)/lint-imports --no-logo

clean:  ## remove what builds and tools leave behind; .venv, runs and the cached models stay
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
