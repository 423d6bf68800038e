# Everything runs in .venv, made on first use. `make help` lists the targets.
#
# pip's indexes are whatever pip is configured to use. Where there is no NVIDIA driver, constraints-cpu.txt pins a
# version of torch that is published as a CPU-only build too; give pip an index that has those builds and it takes them.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first interpreter that is new enough; `make PYTHON=/path/to/python` overrides.
PYTHON ?= $(shell for candidate in python3 python3.13 python3.12 python3.11; do \
	$$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$candidate && break; done)
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 || echo '-c constraints-cpu.txt')

# Arguments for the demo, for example: make demo ARGS="--size small --device cuda"
ARGS ?=

# Test processes, which share the cores.
NUM_WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(NUM_WORKERS) --dist worksteal

# Triton decides when it is imported whether it interprets kernels or compiles them, so there are two runs of pytest; the
# second comes whatever the first one found. $(1): ends both selections; $(2): options of both.
define run-tests
@status=0; \
TRITON_INTERPRET=1 $(PYTEST) --timeout 1500 -m "interpret$(1)" $(2) || status=$$?; \
$(PYTEST) -m "not interpret$(1)" $(2) || status=$$?; \
exit $$status
endef

.PHONY: help setup peers demo test test-all lint format clean

help:
	@echo "make setup    create $(VENV) and install speedstack with its development tools"
	@echo "make peers    llama.cpp, compiled here, and vLLM's CPU build in .venv-peers, for speedstack bench"
	@echo "make demo     the whole stack on a small model, on this machine; ARGS=\"--seed 1 --out runs/mine\""
	@echo "make test     lint, types and all tests but those that take long: for each change"
	@echo "make test-all lint, types and every test, 200 interleavings of the resident kernel instead of 20: as CI does"
	@echo "make lint     ruff and mypy alone"
	@echo "make format   rewrite the code as ruff formats it"
	@echo "make clean    remove $(VENV), caches and build products; runs/ and .venv-peers stay"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints-cpu.txt requirements-peers.txt
	@test -n "$(PYTHON)" || { echo "speedstack needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(CONSTRAINTS) -e '.[dev]'
	$(BIN)/python -m pip install --no-deps -r requirements-peers.txt
	@touch $@

peers: setup
	$(BIN)/python eval/speed/peers/install.py

demo: setup
	$(BIN)/speedstack demo $(ARGS)

test: lint
	$(call run-tests, and not slow and not compile,--interleavings 20)

test-all: lint
	$(call run-tests)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
