# Every target works on a fresh machine that has Python 3.10 or later and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Threads that wait for work by spinning slow each other down where cores are shared: the tests run in two
# processes. A training that has the machine to itself loses by it (docs/regions.md).
test test-part test-all faults check: export OMP_WAIT_POLICY ?= passive
# Compiled modules and tests are kept: each process would compile them anew.
unexport PYTHONDONTWRITEBYTECODE

PART ?= 1/3
.PHONY: demo test test-part test-all faults fuzz docs lint types check clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,dev]"
	# Its torchvision has no build for the CPU alone; its models do without.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps timm
	touch $(STAMP)

demo: $(STAMP)  ## train an MLP on digits, exact and sketched side by side
	$(BIN)/backsketch train

test: $(STAMP)  ## all tests but the slow cases
	$(PYTEST) -m "not slow"

test-part: $(STAMP)  ## a part of the slow cases alone, such as PART=2/3
	$(PYTEST) -m slow --slow-part $(PART)

test-all: $(STAMP)  ## with the slow cases
	$(PYTEST)

faults: $(STAMP)  ## kill runs at random moments, continue them, compare bit for bit
	$(BIN)/python tests/faults/campaign.py --cases 100 --processes 2 --out results/faults/faults.json

fuzz: $(STAMP)  ## a thousand random models and sketches; see docs/testing.md
	PYTHONPATH=tests $(BIN)/python tests/fuzz/fuzz_run.py --cases 1000 --out results/fuzz/fuzz.json

docs: $(STAMP)  ## the site, in site/; warnings are errors
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python -m mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(STAMP)
	$(BIN)/mypy

check: lint types test-all

clean:
	rm -rf $(VENV) build dist site src/*.egg-info
