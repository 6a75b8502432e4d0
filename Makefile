# What a person or a CI machine does here; `make` alone lists it. Everything lands in ignored folders: .venv .kafka .tools .fixtures.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The Python that makes .venv (any 3.11 or later), the port of `make kafka`, how many faults `make chaos` brings about
# and under which Kafka client, the seeds of `make simulate`, extra arguments of a command.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
KAFKA_PORT ?= 9092
# Processes of `make test`: on two cores a third works while the others wait for a broker. One that dies ends the run:
# xdist may wait for ever for its successor.
WORKERS ?= 3
FAULTS ?= 20
CLIENT ?= kafka-python
SEEDS ?= 0..500
ARGS ?=

BIN := .venv/bin
BASE := .venv/.base-installed
FULL := .venv/.full-installed
KAFKA := $(BIN)/python tests/broker/kafka_server.py

.PHONY: help
help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(BASE)  ## A simulated fleet through the service, live, with nothing but Python (ARGS="--seed 7")
	$(BIN)/statestep demo $(ARGS)

.PHONY: setup
setup: $(FULL)  ## Everything that development and tests need: torch, linters, a Kafka, a Prometheus
	$(KAFKA) fetch
	tests/deploy/get_prometheus.sh

.PHONY: test
test: setup lint types  ## Every check and every test, from a fresh clone
	$(BIN)/pytest -n $(WORKERS) --max-worker-restart 0 $(ARGS)

.PHONY: lint
lint: $(FULL)  ## Style and format, by ruff
	$(BIN)/ruff check
	$(BIN)/ruff format --check

.PHONY: types
types: $(FULL)  ## Types, by mypy, strict
	$(BIN)/mypy

.PHONY: kafka
kafka: $(BASE)  ## Start a Kafka broker on localhost (KAFKA_PORT=9092), its data in .kafka/
	$(KAFKA) start --port $(KAFKA_PORT)

.PHONY: kafka-stop
kafka-stop: $(BASE)  ## Stop that broker, and no other
	$(KAFKA) stop

.PHONY: chaos
chaos: $(BASE)  ## Faults under a running service on a real cluster (FAULTS=150 CLIENT=librdkafka ARGS="--seed 7")
	$(BIN)/python -m tests.broker.chaos --faults $(FAULTS) --client $(CLIENT) $(ARGS)

.PHONY: simulate
simulate: $(FULL)  ## The service over a simulated Kafka under faults, by seeds (SEEDS=0..10000, or SEEDS=17 ARGS=-v)
	$(BIN)/python -m tests.simulation SEEDS=$(SEEDS) $(ARGS)

.PHONY: mutants
mutants: $(FULL)  ## A test of the tests: each rule of exactly once is broken, and the simulation must notice
	$(BIN)/python -m tests.simulation.mutants $(ARGS)

.PHONY: bench
bench: $(BASE)  ## Messages per second and CPU time per message, by stage
	$(BIN)/statestep bench $(ARGS)

.PHONY: fixtures
fixtures: $(FULL)  ## Make the models of tests/fixtures anew, by Keras, TensorFlow and torch (1.6 GB, in .fixtures/)
	$(BIN)/python tests/fixtures/make_fixtures.py

.PHONY: docs
docs: $(FULL)  ## Make the tables of docs/conversion.md anew, of every graph that the tests convert
	$(BIN)/python -m tests.export.conversion_table

.PHONY: clean
clean:  ## Stop the broker and remove all that these targets made
	if [ -x $(BIN)/python ] && [ -e .kafka/broker.pid ]; then $(KAFKA) stop; fi
	rm -rf .venv .kafka .tools .fixtures .benchmarks .mypy_cache .ruff_cache .pytest_cache .hypothesis dist demo-out

# The base package alone, which is all that `make demo` installs; `make setup` adds to the same environment.
$(BASE): pyproject.toml
	@test -n "$(PYTHON)" || { echo "statestep needs Python 3.11 or later and found none:" \
		"install one, or name it with PYTHON=/path/to/python3." >&2; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'  # older ones know no dependency groups
	@echo "installing statestep into .venv …"
	$(BIN)/pip install --quiet --editable .
	touch $@

# On Linux torch's wheels load their CUDA libraries, some gigabytes, even where there is no GPU: without them
# `import torch` fails. A pip that is configured for torch's CPU wheels is left its choice.
$(FULL): $(BASE)
	@echo "installing torch and the development tools into .venv, which takes a few minutes the first time …"
	$(BIN)/pip install --quiet --editable '.[export,parquet,librdkafka,compression]' --group dev
	touch $@
