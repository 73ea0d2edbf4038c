# Two commands matter on a fresh clone: `make compare` (the main job) and `make test`. Both set up first.
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := .peers
PEERS_READY := $(PEERS)/.ready
# The environment variable, unlike -c, also pins what builds the package.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: help setup compare study smoke speed peers test test-all lint style format docs wheel clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## make the virtual environment with the pinned packages

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

compare: $(READY)  ## train and compare every member on recall, then on text (15 to 20 minutes on two cores)
	$(BIN)/memory-bench compare --task recall --models all "memformer gradient=replay"
	$(BIN)/memory-bench compare --task text

study: $(READY)  ## the full published comparison (hours; goes on where it was stopped)
	$(BIN)/memory-bench study

smoke: $(READY)  ## the same command in seconds, to see that everything runs
	$(BIN)/memory-bench compare --task recall --out results/smoke/recall --smoke
	$(BIN)/memory-bench compare --task text --out results/smoke/text --smoke

speed: $(READY) $(PEERS_READY)  ## time our modules against the published packages, in one run
	$(BIN)/memory-bench speed

peers: $(PEERS_READY)  ## install the four published packages in an environment of their own

# One of them installs a package called memformer, which must never be on our own path.
$(PEERS_READY): export PIP_CONSTRAINT :=
$(PEERS_READY): benchmarks/requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c $< torch faiss-cpu joblib
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

# The types are one of the tests, so that both cores are busy from the first second.
test: style  ## lint, types and tests (within 5 minutes on two cores)
	$(BIN)/python -m pytest -n 2

test-all: style  ## the slow tests too, those on Ray among them
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,sweep]"
	$(BIN)/python -m pytest -n 2 -m "slow or not slow"

lint: style  ## ruff and mypy
	$(BIN)/mypy

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## let ruff put things in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## build the documentation site into site/ (open site/index.html)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

wheel: $(READY)  ## build the wheel and check what it installs
	$(BIN)/python .ci/check_wheel.py

clean:  ## remove environments, caches and builds (results stay)
	rm -rf $(VENV) $(PEERS) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
