# `make demo` has a pretrained model read a play with a memory and without, `make test` checks everything, `make bench`
# compares speed with others', and loading data with training, `make docs` builds the documentation site into site/. Each
# builds .venv by itself when it is missing or older than what it is built from.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.built
PEERS := .venv-peers

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test bench docs lint format clean

demo: $(STAMP)
	$(BIN)/python -m titans demo

# Compiled Python is kept: every worker and command of the tests would compile the package and the tests anew.
test: lint
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(STAMP) $(PEERS)/.built
	$(BIN)/python benchmarks/speed --peers $(PEERS)/bin/python $(BENCH)
	$(BIN)/python benchmarks/loader.py

# Strict: a broken link, a missing anchor or a page outside of the navigation fails.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --summary=none

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv $(PEERS) demo dist site .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The build backend is installed into an environment of its own, which only these two variables can pin.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; assert sys.version_info >= (3, 11)' 2>/dev/null || { \
	  echo "error: $(PYTHON) is missing, older than 3.11 or cannot create environments;" \
	       "on Debian or Ubuntu: apt-get install python3 python3-venv" \
	       "(or name another Python: make PYTHON=python3.12)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	  $(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0 -e '.[dev]'
	@touch $@

.venv/.docs: $(STAMP)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -q -e '.[docs]'
	@touch $@

# The packages that are compared, away from ours, because they bring a dozen of their own. open-titans needs the same
# ones as titans-pytorch, and runs on a Python older than the one it asks for.
$(PEERS)/.built: constraints.txt
	$(PYTHON) -m venv $(PEERS)
	PIP_CONSTRAINT=constraints.txt $(PEERS)/bin/python -m pip install -q torch==2.13.0 titans-pytorch==0.5.5 tqdm transformers
	$(PEERS)/bin/python -m pip install -q --no-deps --ignore-requires-python open-titans==1.1.0
	@touch $@
