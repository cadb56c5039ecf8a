# Needs Python >= 3.11, git and make. Another interpreter or place: make test PYTHON=python3.12 VENV=.venv312
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread per test process: sums of a fixed order, and no fight over the cores.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

BENCHMARKS := step_vs_trl demo_vs_trl learner_vs_trl rollout_vs_trl scaling scaling_ranks memory_between_phases memory_plan

.PHONY: env demo test lowest slow bench lint format

env: $(INSTALLED)  ## the environment, made anew when pyproject.toml or the constraints change

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, $(PYTHON) is " + sys.version.split()[0] + "; use make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

demo: env  ## train a small policy on the spot and show its accuracy before and after
	$(BIN)/python recipes/demo/demo.py

test: env  ## everything that takes seconds
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m "not slow"

lowest:  ## the same, with the lowest versions that pyproject.toml allows
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

slow: env  ## everything that takes minutes
	$(TEST_ENV) $(BIN)/python -m pytest -m slow --durations=0 --durations-min=1

bench: env  ## side by side with TRL: about an hour on two cores
	set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py; done

lint: env  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: env  ## what ruff can put right itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
