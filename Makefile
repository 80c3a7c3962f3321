# What a person and CI call alike. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

# The first interpreter in this list that is Python 3.11 to 3.13; say PYTHON=... to choose another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
STAMP := .venv/installed.stamp
LOG := .venv/setup.log
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
ROOMS := system replay actors learner deploy bench

.PHONY: help setup demo test drills lint types layers proof bench chaos chaos-replay bare proto docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14

setup: $(STAMP)  ## make .venv and install the pinned dependencies, once

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "setup: found no Python 3.11, 3.12 or 3.13 on PATH (python3 is $$(python3 --version 2>&1 || true));" \
			"install one, or run make PYTHON=/path/to/python3.11" >&2; exit 3; fi
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "setup: $(PYTHON) cannot make virtual environments (modules venv and ensurepip must import);" \
			"on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 3; }
	@echo "== setup: $$($(PYTHON) --version) in .venv, pinned by constraints.txt (minutes; log: $(LOG))"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@# torch goes first and alone: a wheel the machine's pip settings offer (CPU or CUDA) then satisfies all that follows.
	@for what in "$(TORCH)" "-e .[dev,datasets]"; do \
		echo "pip install $$what"; \
		$(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
			$$what -c constraints.txt >>$(LOG) 2>&1 || { \
			tail -n 15 $(LOG) >&2; echo "setup: pip install $$what failed; the whole log is $(LOG)" >&2; exit 3; }; \
	done
	@touch $@

demo: setup  ## train CartPole through the whole system, a few minutes on 2 cores
	@$(BIN)/dreamfleet train cartpole

test: setup lint layers types  ## lint, layers, types and all tests but the long drills
	@echo "== pytest"
	@$(BIN)/python -m pytest -q

drills: setup  ## the tests that `make test` leaves out: whole runs that resume, evolve, lose nodes
	@$(BIN)/python -m pytest -q -m drill

lint: setup  ## ruff: rules and format
	@echo "== lint"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

layers: setup  ## import-linter: who may import whom
	@echo "== layers"
	@$(BIN)/lint-imports --no-logo

types: setup  ## pyright over all rooms
	@echo "== types"
	@$(BIN)/pyright $(ROOMS)

proof: setup  ## learning proofs, up to an hour
	@$(BIN)/python -m bench.proof

bench: setup  ## every benchmark; rewrites the tables in docs/performance.md
	@$(BIN)/python -m bench all

chaos: setup  ## kill the parts of a run; rewrites the table in docs/reliability.md
	@$(BIN)/python -m bench chaos

chaos-replay: setup  ## kill, corrupt and fill up a replay; rewrites its tables in docs/reliability.md
	@$(BIN)/python -m bench chaos_replay

bare: setup  ## train and bench in a second environment that has neither ray nor envpool
	@$(BIN)/python -m bench.bare

proto: setup  ## regenerate the gRPC code from every .proto file
	@$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. \
		$$(find $(ROOMS) -name '*.proto')

docs: setup  ## regenerate docs/metrics.md, docs/health.md and the alert rules from the code
	@PYTHONPATH=. $(BIN)/python docs/generate_metrics.py
	@PYTHONPATH=. $(BIN)/python docs/generate_health.py

clean:  ## remove the environment and every cache; runs/ stays
	@rm -rf .venv build .build .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
