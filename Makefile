# Every target does its own set-up: a virtual environment in .venv, from pip and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

MODEL ?= smollm2-135m
BUDGET ?= 25%
OUT ?= runs/$(MODEL)-$(subst %,,$(BUDGET))
FIT ?=
# tests are many and small: a process a core, one thread each
JOBS ?= 2

.PHONY: help fit test lint claims clean

help:
	@echo "make fit     fit $(MODEL) to $(BUDGET) of its bf16 size, into $(OUT)  (MODEL=, BUDGET=, OUT=, FIT='more options')"
	@echo "make test    run the tests"
	@echo "make lint    ruff and mypy"
	@echo "make claims  run every claim and write docs/claims.md"
	@echo "make clean   remove .venv and what the tools cached"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, and $(PYTHON) is older; give another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

fit: $(READY)
	$(BIN)/pennyweight assets fetch $(MODEL) wiki
	$(BIN)/pennyweight fit $(MODEL) --budget $(BUDGET) --data wiki --out $(OUT) $(FIT)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

claims: $(READY)
	$(BIN)/pennyweight claims run --all --page docs/claims.md --keep runs/claims.jsonl

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
