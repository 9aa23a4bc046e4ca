# `make demo` runs the whole project once; `make test` checks it. Both set up .venv first, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
SIDE_BY_SIDE := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0

.PHONY: help setup demo test test-slow mutate lint packages clean

help:
	@echo "make demo       set up, then run everything: about eight minutes, ends with the path of the report"
	@echo "make test       set up, then lint, types and tests"
	@echo "make test-slow  the long forms of the tests"
	@echo "make mutate     whether the tests of the maths can fail: half an hour"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("rushes needs Python 3.11 or newer, this is %s. Run: make PYTHON=python3.11 ..." % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(READY)
	$(OFFLINE) $(BIN)/rushes demo

test: lint packages
	$(OFFLINE) $(BIN)/python -m pytest -p no:cacheprovider -m "timed and not slow"
	$(OFFLINE) $(BIN)/python -m pytest -p no:cacheprovider -m "not timed and not slow" $(SIDE_BY_SIDE)

test-slow: $(READY) packages
	$(OFFLINE) $(BIN)/python -m pytest -p no:cacheprovider -m slow

packages:  # what the tests of the app drive; without them they are skipped, with the reason
	@test -x /usr/bin/chromium -a -d /usr/lib/postgresql || \
	  (test "$$(id -u)" = 0 && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium postgresql fonts-dejavu-core) || \
	  echo "chromium and postgresql are not installed, and could not be: apt-get install chromium postgresql"

mutate: $(READY)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutate

lint: $(READY)
	$(BIN)/ruff check --no-cache .
	$(BIN)/mypy --cache-dir=/dev/null

clean:
	rm -rf $(VENV) build runs *.egg-info
