# `make demo` and `make test` work on a fresh machine that has Python >= 3.11, make and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Two threads on a shared machine can be many times slower than one.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: venv demo test coverage lint docs study methods-table format clean

venv: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mllm_cl needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: venv
	$(BIN)/mllm-cl demo

test: venv
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

coverage: venv
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --cov --cov-report=term:skip-covered

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: venv
	$(BIN)/python docs/build.py

# what is missing in docs/measured/runs.jsonl; STUDY="--measured again.jsonl" runs everything again
study: venv
	$(BIN)/python benchmarks/study.py --output runs/study $(STUDY)

# the same; TABLE="--streams quickstart --orders given --seeds 0" is the beginning of it
methods-table: venv
	$(BIN)/python benchmarks/methods_table.py --output runs/methods $(TABLE)
	$(BIN)/python docs/build.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .coverage*
