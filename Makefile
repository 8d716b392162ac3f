# One word for each thing there is to do:
#   make serve     set up what is missing and run the daemon with local desktops on 127.0.0.1:15001
#   make test      set up what is missing and run every check
#   make evaluators  the interpreter that evaluations run in (1.4 GB, without torch)
#   make install   virtual environment and packages only
#   make check     format, lint, types (no tests)
#   make bench     measure start-up, resets, steps, set-ups, evaluations and memory
#   make format    rewrite the code as `make check` wants it

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EVALUATORS ?= .venv-evaluators
EVALUATORS_STAMP := $(EVALUATORS)/.installed
TESTS ?=

.PHONY: serve test install evaluators check bench format system
.DEFAULT_GOAL := serve

serve: system install
	@PYTHON=$(BIN)/python deploy/serve.sh

test: system install evaluators check
	$(BIN)/python -m pytest $(TESTS)

install: $(STAMP)

evaluators: $(EVALUATORS_STAMP)

check: install
	$(BIN)/ruff format --check envd tests
	$(BIN)/ruff check envd tests
	$(BIN)/mypy

bench: system install evaluators
	$(BIN)/python tests/bench.py --evaluators $(EVALUATORS)/bin/python

format: install
	$(BIN)/ruff format envd tests
	$(BIN)/ruff check --fix envd tests

# Debian packages that local desktops are made of.
system:
	@deploy/system-packages.sh

$(STAMP): pyproject.toml constraints.txt
	@deploy/make-venv.sh "$(PYTHON)" "$(VENV)"
	@touch $(STAMP)

$(EVALUATORS_STAMP): deploy/evaluators.txt
	@deploy/make-evaluators.sh "$(PYTHON)" "$(EVALUATORS)"
	@touch $(EVALUATORS_STAMP)
