# The project's commands. `make help` lists them; CONTRIBUTING.md says when to use which.
#
# PYTHON    the interpreter that environments are made with, 3.11 or newer (default: see tools/interpreter.sh)
# WORKERS   processes that run tests side by side (default: 2)
# ARGS      more arguments for pytest: make test ARGS="-k cleanup"

PYTHON ?=
WORKERS ?= 2
ARGS ?=
export PYTHON
# tests are rewritten and compiled once, not in each process of each run
unexport PYTHONDONTWRITEBYTECODE

PY := .venv/bin/python
TYPED := src tests examples benchmarks docs
# contracts, crashes, concurrency and the command line take minutes: not in the inner loop
QUICK := tests/unit tests/property -m "not services and not slow"

.PHONY: help demo test check lint types layers coverage oldest docs dist downstream format clean bench
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## the main job in the open: a real Glance, an image, its root disks (installs what is missing)
	@tools/setup.sh demo
	@PYTHONPATH=tests $(PY) examples/demo/demo.py

test: ## everything: lint, types, layering, the whole suite with real services (installs what is missing)
	@tools/setup.sh test
	@$(MAKE) --no-print-directory lint types layers
	$(PY) -m pytest -n $(WORKERS) $(ARGS)

check: ## the quick inner loop, under a minute: lint, types, layering, tests without services
	@tools/setup.sh check
	@$(MAKE) --no-print-directory lint types layers
	@# one more at a time: many of these wait for something
	$(PY) -m pytest -q -n $$(($(WORKERS) + 1)) $(QUICK) $(ARGS)

lint: .venv ## ruff: lint and format
	$(PY) -m ruff check --quiet .
	$(PY) -m ruff format --check --quiet .

types: .venv ## mypy, strict, on the library, its tests, examples, benchmarks and docs
	$(PY) -m mypy $(TYPED)

layers: .venv ## import-linter: who may import whom (.importlinter)
	.venv/bin/lint-imports --no-logo

bench: ## the benchmarks beside Nova and Ironic, up to an hour: ARGS="--quick", "--only cold", "--publish" (docs)
	@tools/setup.sh bench
	@PYTHONPATH=tests $(PY) -m benchmarks $(ARGS)

coverage: ## line and branch coverage of the whole suite
	@tools/setup.sh test
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest -q $(ARGS)
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report --skip-covered --show-missing

oldest: ## the quick tests with the oldest dependencies that pyproject.toml allows
	@tools/oldest.sh -n $(WORKERS) $(QUICK) $(ARGS)

docs: ## the documentation in docs/_build/html; warnings are errors (installs what is missing)
	@tools/setup.sh docs
	@$(PY) -m sphinx -n -W --keep-going -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

dist: ## sdist and wheel in dist/, after both were installed into empty environments and used there
	@tools/setup.sh check
	$(PY) -m pytest -q tests/packaging/test_distribution.py $(ARGS)
	@PYTHONPATH=tests $(PY) -m harness.built dist

downstream: ## the suites of the examples, as their authors run them, against this folder: ARGS="NAME", ARGS="PATH"
	@tools/setup.sh test
	@tools/downstream.sh $(ARGS)

format: .venv ## let ruff mend what it can
	$(PY) -m ruff check --quiet --fix . || true
	$(PY) -m ruff format .

.venv:
	@tools/setup.sh check

clean: ## remove what these commands made: environments, caches, reports
	rm -rf .venv .venv-glance .venv-nova .venv-ironic .work build dist docs/_build .hypothesis .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	rm -rf src/*.egg-info .coverage .coverage.*
	find src tests examples benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +
