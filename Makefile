# One word for each thing there is to do:
#   make serve     set up what is missing and run the daemon on 127.0.0.1:15001, with local desktops unless PROVIDER says otherwise
#   make test      set up what is missing and run every check
#   make evaluators  the interpreter that evaluations run in (1.4 GB, without torch)
#   make images    container desktop, virtual machine and its disk, from Debian packages (PROVIDER=docker, PROVIDER=qemu)
#   make install   virtual environment and packages only, those of the checks too
#   make check     format, lint, types (no tests)
#   make docs      write the pages of /docs that follow from the code
#   make bench     measure start-up, resets, steps, set-ups, evaluations and memory
#   make bench-docker  measure containers, virtual machines, templates and clones, side by side
#   make soak      clients play for minutes while clients, daemon, desktops and answers are lost; what came of it
#   make soak-docker   hundreds of resets in a row, and what they leave behind
#   make format    rewrite the code as `make check` wants it

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SERVES := agent,aws,docker,qemu
SERVING := $(VENV)/.serving
STAMP := $(VENV)/.installed
EVALUATORS ?= .venv-evaluators
EVALUATORS_STAMP := $(EVALUATORS)/.installed
TESTS ?=
SOAK ?=

.PHONY: serve test install evaluators images check docs bench bench-docker soak soak-docker format system system-all engines
.DEFAULT_GOAL := serve

serve: system $(SERVING)
	@PYTHON=$(BIN)/python deploy/serve.sh

test: system-all install evaluators engines check
	$(BIN)/python -m pytest $(TESTS)

install: $(STAMP)

evaluators: $(EVALUATORS_STAMP)

images: $(SERVING)
	@PYTHON=$(BIN)/python deploy/make-images.sh

check: install
	$(BIN)/ruff format --check envd tests
	$(BIN)/ruff check envd tests
	$(BIN)/mypy

docs: install
	$(BIN)/python -m envd.app.docs

bench: system install evaluators
	$(BIN)/python tests/bench.py --evaluators $(EVALUATORS)/bin/python

bench-docker: system-all install engines
	$(BIN)/python tests/bench_docker.py

soak: install
	$(BIN)/python tests/soak.py $(SOAK)

soak-docker: system-all install engines
	$(BIN)/python tests/soak_docker.py

format: install
	$(BIN)/ruff format envd tests
	$(BIN)/ruff check --fix envd tests

# Debian packages that the desktops are made of: those of the provider that is chosen, or every one.
system:
	@deploy/system-packages.sh "$$(deploy/provider.sh)"

system-all:
	@deploy/system-packages.sh all

# A Docker engine that runs, our images and the guest disk; without them their tests are skipped, but not in CI.
engines: install
	@PYTHON=$(BIN)/python deploy/test-engines.sh

$(SERVING): pyproject.toml constraints.txt
	@deploy/make-venv.sh "$(PYTHON)" "$(VENV)" "$(SERVES)"
	@touch $(SERVING)

$(STAMP): $(SERVING)
	@deploy/make-venv.sh "$(PYTHON)" "$(VENV)" "$(SERVES),dev"
	@touch $(STAMP)

$(EVALUATORS_STAMP): deploy/evaluators.txt
	@deploy/make-evaluators.sh "$(PYTHON)" "$(EVALUATORS)"
	@touch $(EVALUATORS_STAMP)
