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

.PHONY: help setup peers demo test lint format clean

help:
	@echo "make setup    create $(VENV) and install speedstack with its development tools"
	@echo "make peers    llama.cpp, compiled here, and vLLM's CPU build in .venv-peers, for speedstack bench"
	@echo "make demo     the whole stack on a small model, on this machine; ARGS=\"--seed 1 --out runs/mine\""
	@echo "make test     lint, types and the test suite"
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
	$(BIN)/python -m pytest -n 2

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
