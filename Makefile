# make run          set up .venv, prune the embedded demo model to 2:4, print its perplexities
# make test         set up .venv, run the tests, as many at a time as there are cores
# make test-faults  the long form of the fault tests: kills, full disks, damaged files (`make test` has a short form)
# make test-long    every case of the tests over tables, of which `make test` has a covering part; more drawn examples
# make test-oldest  set up .venv-oldest with the oldest supported libraries, run the tests that depend on them
# make bench-gpu    set up .venv, test and measure everything on a GPU: bench-gpu/bench-gpu.json, .md and logs
# make bench-gpu-here  the same with the torch, triton and transformers that $(PYTHON) has: needs no network
# make check        lint, types and tests: the gate
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TYPED := build/typecheck
# Tests start a hundred processes: modules are compiled once, also where the environment says otherwise.
export PYTHONDONTWRITEBYTECODE :=
OLDEST := .venv-oldest
OLDEST_READY := $(OLDEST)/.ready
# Each file in one process: what its tests share is made once.
SIDE_BY_SIDE := -n auto --maxprocesses 8 --dist loadfile

.PHONY: setup run test test-fast test-faults test-long test-oldest check lint types bench bench-gpu bench-gpu-here clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

run: $(READY)
	$(BIN)/python -m sparsegpt run --model demo --sparsity 2:4 --overwrite

test: $(READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-fast: $(READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not faults and not long"

test-faults: $(READY)
	$(BIN)/python -m pytest tests/faults -m "faults or not faults" -s

test-long: $(READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "long or hypothesis" --hypothesis-profile long

test-oldest: $(OLDEST_READY)
	$(OLDEST)/bin/python -m pytest -m "not faults" tests/kernels tests/model tests/run/test_streamed_run.py tests/solvers/test_fused.py

$(OLDEST_READY): pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[dev]'
	touch $@

check: lint types test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows folders, not setuptools' mapping of names: give it the package as it is imported, by links.
types: $(READY)
	rm -rf $(TYPED) && mkdir -p $(TYPED)
	cp -rs $(CURDIR)/sparsegpt $(TYPED)/sparsegpt
	for part in kernels eval calib_data; do cp -rs $(CURDIR)/$$part $(TYPED)/sparsegpt/$$part; done
	$(BIN)/mypy -p sparsegpt

bench: $(READY)
	$(BIN)/python -m sparsegpt bench solver

bench-gpu: $(READY)
	$(BIN)/python -m sparsegpt bench gpu $(ARGS)

bench-gpu-here:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation -e .
	$(PYTHON) -m sparsegpt bench gpu $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info
