# `make demo` and `make test` set up everything they need; a second call installs nothing again.
# `make test-quick` runs what starts no process of its own, in one or two minutes; `make test` begins with it;
# `make test-long` runs what trains for minutes. As many tests run at a time as there are cores, up to four. Those of
# processes are handed out in their order, by `load`: what forks comes before what starts threads.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-faults test test-quick test-long lint types clean

demo: $(INSTALLED)
	$(BIN)/python examples/iris.py --devices 4 --strategy elastic-gossip

demo-faults: $(INSTALLED)
	$(BIN)/python examples/faults.py

test: test-quick
	$(BIN)/python -m pytest -m "processes or slow" -n logical --maxprocesses 4 --dist load

test-quick: $(INSTALLED)
	$(BIN)/python -m pytest -m "not processes and not slow" -n logical --maxprocesses 4 --dist worksteal

test-long: $(INSTALLED)
	$(BIN)/python -m pytest --long -m long

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
