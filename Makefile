# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv first.
PYTHON ?= python3
TORCH ?= torch==2.13.0  # installed first: what depends on torch would otherwise choose a build by itself
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint fix docs clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: .venv/demo  ## teach a small real model to subtract, on two CPU cores, in a few minutes
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: .venv/dev  ## the tests, without the slow ones; prints its time
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: .venv/dev  ## the tests on the real small model
	$(BIN)/python -m pytest -m slow

lint: .venv/dev  ## style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: .venv/dev  ## put the style right
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/dev  ## write the generated pages again
	$(BIN)/python tools/docs.py

clean:  ## remove the environment and what runs left behind
	rm -rf .venv runs out .cache build

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	@touch $@

.venv/demo: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	@touch $@

.venv/dev: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@ .venv/demo
