# Two commands do everything: `make up` runs the example mesh, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: up test test-redis soak soak-redis conformance check lint types docs install install-dev worker servers bench bench-policy bench-quota clean help

help:
	@echo "make up      run the example mesh in one process (ARGS='--state DIR ...' are passed on)"
	@echo "make test    install what the tests need, check the code, run all tests"
	@echo "make test-redis SERVER=/path/to/redis-server  run the tests of quotas against another Redis or Valkey"
	@echo "make soak    many more seeds of the simulated fleet (ARGS='--seeds 100000')"
	@echo "make soak-redis  gateways under load while a real Redis is killed, paused, slow, failed over (ARGS='--seconds 20 --rounds 3 cluster')"
	@echo "make check   ruff, mypy --strict and the import directions"
	@echo "make conformance  run Gateway API's own suite against gateways (ARGS='HTTPRouteMatching ...' runs some of it)"
	@echo "make bench   measure side by side with Envoy and print a table"
	@echo "make bench-policy  measure what decisions cost, beside OPA in Go"
	@echo "make bench-quota  measure what quota decisions cost, beside envoyproxy/ratelimit and the library limits"

$(VENV)/.made: 
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Tollhouse needs Python 3.11 or newer: make PYTHON=python3.x")'
	@echo "making the virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made setup.cfg pyproject.toml
	@echo "installing Tollhouse and its libraries"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the tools for tests and checks"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

worker: install
	@$(BIN)/python -m pdp.build > /dev/null

up: worker
	@exec $(BIN)/tollhouse up $(ARGS)

servers: install-dev
	@$(BIN)/python -m tests.install

docs: install-dev
	@$(BIN)/python -m mesh.compatibility > docs/compatibility.md

lint: install-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: install-dev
	@$(BIN)/mypy

check: lint types
	@$(BIN)/python -m pytest tests/house

test: check worker servers
	@$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-redis: install-dev
	@TOLLHOUSE_REDIS_SERVER="$(SERVER)" $(BIN)/python -m pytest tests/quota $(ARGS)

soak: install-dev
	@$(BIN)/python -m tests.sim $(ARGS)

soak-redis: install-dev servers
	@$(BIN)/python -m bench.redis_faults $(ARGS)

conformance: install-dev
	@$(BIN)/python -m tests.conformance $(ARGS)

bench: worker servers
	@$(BIN)/python -m bench $(ARGS)

bench-policy: worker servers
	@$(BIN)/python -m bench.policy $(ARGS)

bench-quota: servers
	@$(BIN)/python -m bench.quota $(ARGS)

clean:
	rm -rf $(VENV) .tollhouse .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
