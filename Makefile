# `make demo` and `make test` set up everything they need; a second call installs nothing again.
# `make test-quick` runs what starts no process of its own, in one or two minutes; `make test` begins with it;
# `make test-long` runs what trains for minutes, and further cases of a kind. One more test runs at a time than
# there are cores, up to four: many wait. Those of processes are handed out in their order, by `load`: what forks comes first.
# The first of these that runs, is at least 3.11 and can make virtual environments; `make PYTHON=…` names another.
CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3 python
SUITS := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in $(CANDIDATES); do $$python -c '$(SUITS)' 2>/dev/null && echo $$python && break; done)
WORKERS = $(shell expr 1 + $$(nproc))
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
INSTALLED := $(VENV)/.installed
DOCS := $(VENV)/.installed-docs

export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-faults test test-quick test-long test-oldest lint types docs build clean

demo: $(INSTALLED)
	$(BIN)/python examples/iris.py --devices 4 --strategy elastic-gossip

demo-faults: $(INSTALLED)
	$(BIN)/python examples/faults.py

test: test-quick
	$(BIN)/python -m pytest -m "processes or slow" -n $(WORKERS) --maxprocesses 4 --dist load --maxschedchunk 1

test-quick: $(INSTALLED)
	$(BIN)/python -m pytest -m "not processes and not slow" -n $(WORKERS) --maxprocesses 4 --dist worksteal

test-long: $(INSTALLED)
	$(BIN)/python -m pytest --long -m long

# The oldest versions that are supported, without torchvision and so without the examples.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest --ignore tests/examples --ignore tests/benchmarks -n $(WORKERS) --maxprocesses 4

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[report,test]'
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

# The site, in build/site. A warning fails it, and so does a link that leads nowhere.
docs: $(DOCS)
	$(BIN)/python -m sphinx -W --keep-going --nitpicky -c docs -b html . build/site
	@echo "build/site/index.html"

$(DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

build: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

$(INSTALLED): pyproject.toml
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { \
	  echo "make needs Python 3.11 or newer with its venv and ensurepip modules (Debian: apt install python3-venv);" \
	    "none of $(CANDIDATES) is one. Name another: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
