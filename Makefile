# Everything from nothing but Python and pip: each target sets up its own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= smollm2-135m
# The torch to install first, so that everything else is resolved against it; TORCH= leaves the choice to pip.
TORCH ?= torch==2.13.0

.PHONY: help setup demo test check format clean circuits steer-check

help:
	@echo "make demo         extract directions, build circuits and write steered replies with the embedded model"
	@echo "make test         the tests (no network beyond installing)"
	@echo "make check        formatter, linter, type checker"
	@echo "make circuits     directions, scores and circuit of MODEL=$(MODEL) into artifacts/"
	@echo "make steer-check  judge steered replies on the test split (MODEL=$(MODEL))"

$(VENV)/.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

setup: $(VENV)/.stamp

demo: setup
	$(BIN)/python -m emosteer.demo

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check emosteer tests bench
	$(BIN)/ruff check emosteer tests bench
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format emosteer tests bench
	$(BIN)/ruff check --fix emosteer tests bench

circuits: setup
	$(BIN)/emosteer extract --model $(MODEL)
	$(BIN)/emosteer ablate --model $(MODEL)
	$(BIN)/emosteer circuit --model $(MODEL)

steer-check: setup
	$(BIN)/python bench/steer_check.py --model $(MODEL)

clean:
	rm -rf $(VENV) artifacts .pytest_cache .ruff_cache .mypy_cache
