# Everything runs in an own virtual environment, made on the first call; setup.cfg says what goes in.
.DEFAULT_GOAL := help
.PHONY: help setup search test test-slow lint type docs format clean

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS  ?=

PYTHONS := $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python3.10 python

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  ARGS="..." is handed on: make search ARGS="method.steps=50", make test ARGS="-k minmax"'

setup: $(STAMP) ## make the virtual environment (the other targets do it themselves)

$(STAMP): setup.cfg pyproject.toml
	@if [ ! -x $(BIN)/python ]; then python=; \
	  for candidate in $(PYTHONS); do \
	    "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && python=$$candidate && break; \
	  done; \
	  [ -n "$$python" ] || { \
	    echo 'error: no Python 3.10 or newer found; install one, or name it: make PYTHON=/path/to/python3' >&2; exit 2; }; \
	  "$$python" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: $$python cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 2; }; \
	  echo "$$python -m venv $(VENV)"; \
	  "$$python" -m venv $(VENV) || { \
	    rm -rf $(VENV); echo "error: '$$python -m venv $(VENV)' failed; the lines above say why" >&2; exit 2; }; \
	fi
	@echo 'installing dqss and what it needs into $(VENV); the first time this takes some minutes'
	@$(BIN)/python -m pip install --quiet 'pip>=23'
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

search: $(STAMP) ## search a strategy for the embedded network: ResNet-20 on digits, three minutes
	$(BIN)/python -m dqss.search +experiment=resnet_ptq $(ARGS)

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(STAMP) ## run the slow tests alone
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(STAMP) ## ruff, formatting, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(STAMP) ## mypy
	$(BIN)/mypy

docs: $(STAMP) ## build the documentation into site/; warnings are errors
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

format: $(STAMP) ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment, builds and caches (results stay)
	rm -rf $(VENV) $(VENV)-wheel build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find dqss conf search_spaces tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +
