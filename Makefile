# Everything from nothing but Python and pip: each target sets up its own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= smollm2-135m
# Where `make judge` finds the public labelled texts (docs/JUDGES.md); they are not part of this project.
PUBLIC ?=
# Options for every stage that loads the model, for example OPTIONS="--dtype bfloat16".
OPTIONS ?=
# How large the dial, its check and the contest are: as in docs/RESULTS.md, whose contest leaves the controls out. DIAL= CHECK= CONTEST= leave it to the commands (hours).
DIAL ?= --groups 32 --points 6 --refine 1 --max-new-tokens 48 --batch-size 96
CHECK ?= --groups 24 --skip 6 --max-new-tokens 48 --batch-size 96
CONTEST ?= --groups 48 --dev-groups 16 --doses 0.7,1,1.3 --max-new-tokens 48 --batch-size 96
# The torch to install first, so that everything else is resolved against it; TORCH= leaves the choice to pip.
TORCH ?= torch==2.13.0

# Processes that share the tests of `make test`, a file of tests each at a time.
TEST_PROCESSES ?= 2

.PHONY: help setup demo serve test test-everywhere fuzz from-wheel check format clean circuits judge chooser evaluate report reproduce bench notebook families commands showcase docs cuda

help:
	@echo "make demo         replies of the shipped circuit beside unsteered ones, read by the judges, and a small extraction (half a minute)"
	@echo "make serve        the server and its playground at http://127.0.0.1:8017/"
	@echo "make test         the tests (no network beyond installing)"
	@echo "make test-everywhere  the tests as other processors would run them, on one thread and on two, in random orders (six times make test)"
	@echo "make fuzz         broken files for every reader, nonsense for every option, kills at random moments (about half an hour)"
	@echo "make from-wheel   the wheel alone in a fresh environment: the README's commands in order, then every command once (three minutes)"
	@echo "make check        formatter, linter, type checker"
	@echo "make circuits     directions, scores and circuit of MODEL=$(MODEL) into artifacts/"
	@echo "make judge        fit the judges again from data/judge/ and PUBLIC=FOLDER (bit for bit on one machine) and print their card"
	@echo "make chooser      fit what chooses the best of several replies again, from data/judge/, and print its card (ten minutes)"
	@echo "make evaluate     the contest of all methods for MODEL=$(MODEL)"
	@echo "make report       one HTML page from what is in artifacts/"
	@echo "make bench        every figure of docs/SPEED.md again, as ratios on this machine; OPTIONS=\"--only startup\" for a part"
	@echo "make families     docs/FAMILIES.md again, after a change of the architecture table"
	@echo "make commands     docs/COMMANDS.md again, after a change of an option"
	@echo "make showcase     the pictures and the gallery of the documents again, from the model (a minute)"
	@echo "make docs         the documents as a site in build/site/; a dead link stops it"
	@echo "make cuda         on a CUDA machine: every stage against the CPU, tokens/s beside the bandwidth bound, into bench/gpu/; no network"
	@echo "make reproduce    circuits, heads, the dial's check, evaluate and report for MODEL=$(MODEL), with time and memory of each; goes on where it stopped"

$(VENV)/.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

setup: $(VENV)/.stamp

demo: setup
	$(BIN)/python -m emosteer.cli.demo

serve: setup
	$(BIN)/emosteer serve --model $(MODEL) $(OPTIONS)

test: setup
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

# Three levels of instructions x one and two threads; three random orders. Stops at the first that fails, whose settings it has printed.
test-everywhere: setup
	$(BIN)/python tests/everywhere.py

fuzz: setup
	$(BIN)/python tests/fuzz_readers.py
	$(BIN)/python tests/fuzz_options.py
	$(BIN)/python tests/kills.py

# Builds the wheel and the sdist, has twine check them, and runs the README's commands and every other one from the wheel alone.
from-wheel: setup
	$(BIN)/python tests/from_wheel.py $(if $(TORCH),--torch '$(TORCH)')

check: setup
	$(BIN)/ruff format --check emosteer tests bench
	$(BIN)/ruff check emosteer tests bench
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format emosteer tests bench
	$(BIN)/ruff check --fix emosteer tests bench

circuits: setup
	$(BIN)/emosteer extract --model $(MODEL) $(OPTIONS)
	$(BIN)/emosteer ablate --model $(MODEL) $(OPTIONS)
	$(BIN)/emosteer circuit --model $(MODEL) $(OPTIONS)
	$(BIN)/emosteer calibrate --model $(MODEL) $(DIAL) $(OPTIONS)

judge: setup
	$(if $(PUBLIC),,$(error make judge needs PUBLIC=FOLDER, the folder of public labelled texts; docs/JUDGES.md says which, and `python -m emosteer.judges.sources FOLDER` fetches them))
	$(BIN)/python -m emosteer.judges.training $(PUBLIC) $(OPTIONS)

chooser: setup
	$(BIN)/python -m emosteer.judges.choosing.training $(OPTIONS)

evaluate: setup
	$(BIN)/emosteer evaluate --model $(MODEL) $(CONTEST) $(OPTIONS)

report: setup
	$(BIN)/emosteer report --model $(MODEL)

# The table of docs/FAMILIES.md, from the code and the random models of its tests.
families: setup
	$(BIN)/python -m tests.families

# The page of all options, from the commands.
commands: setup
	$(BIN)/python -m tests.commands

# docs/demo.svg, docs/methods.svg and docs/GALLERY.md.
showcase: setup
	$(BIN)/python -m bench.showcase

# Packages that only this target needs; strict, so that a dead link stops it.
docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# The outputs that are kept in the notebooks.
notebook: setup
	$(BIN)/jupyter execute --inplace examples/*.ipynb

bench: setup
	$(BIN)/python -m bench $(OPTIONS)

# On a CUDA machine with what is installed there: CUDA_PYTHON is a Python that has this package's dependencies and a CUDA build of torch.
CUDA_PYTHON ?= python3
cuda:
	$(CUDA_PYTHON) -m pytest -m gpu tests/test_cuda.py
	$(CUDA_PYTHON) -m bench.cuda $(OPTIONS)

# Stages that are finished are not run again while code, data and options are the same (bench/reproduce.py).
reproduce: setup
	$(BIN)/python -m bench.reproduce --model '$(MODEL)' --each='$(OPTIONS)' --dial='$(DIAL)' --check='$(CHECK)' --contest='$(CONTEST)'

clean:
	rm -rf $(VENV) artifacts .pytest_cache .ruff_cache .mypy_cache
