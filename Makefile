# Two commands need nothing but this file, Python 3.11 or 3.12, and pip's registry: `make demo` and `make test`.
# Every target first makes .venv from constraints.txt; its stamp file lets later runs reuse it.
# Another interpreter: make PYTHON=/path/to/python3.12 test

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?=
PY := .venv/bin/python
STAMP := .venv/installed.stamp
TEST_FLAGS ?= -n 2 --timeout 600
# The oldest Triton that pyproject.toml allows, beside the installed one: kernels have to compile with both.
OLDEST_TRITON := $(if $(filter Linux,$(shell uname)),.make/triton-3.6.0)

.PHONY: help venv demo test test-gpu check format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP) ## fine-tune a real 135M model on the CPU and print a before/after table
	@$(PY) scripts/demo.py

test: $(STAMP) $(OLDEST_TRITON) ## the whole test suite (CPU)
	@$(PY) -m pytest $(TEST_FLAGS)

.make/triton-%: | $(STAMP)
	@rm -rf $@.part
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps --target $@.part triton==$*
	@mv $@.part $@

test-gpu: $(STAMP) ## the tests that need an accelerator
	@$(PY) -m pytest -m gpu

check: $(STAMP) ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(STAMP) ## let ruff format and fix
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean: ## remove .venv, builds and caches (runs/ and models/ stay)
	rm -rf .venv dist .make .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(STAMP) ## only make .venv

# torch comes first and by itself: a plain pip install takes the build that fits the machine.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(PY) -c 'import pip' 2>/dev/null; then \
	  for python in $(or $(PYTHON),python3.11 python3.12 python3); do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1; then \
	      found="$$python"; break; \
	    fi; \
	  done; \
	  if [ -z "$${found:-}" ]; then \
	    echo "error: no Python 3.11 or 3.12 with venv among: $(or $(PYTHON),python3.11 python3.12 python3) (python3 is" \
	      "$$(python3 --version 2>&1 || true)); install one, or run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
	    exit 2; \
	  fi; \
	  echo "making .venv with $$("$$found" --version)"; \
	  "$$found" -m venv --clear .venv; \
	fi
	@echo "installing (minutes the first time)"
	@$(PY) -m pip install -qq --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)
