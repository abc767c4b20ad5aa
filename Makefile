# make run    sets up, then trains: ResIST with 4 workers on scikit-learn's digits
# make test   sets up, then runs the tests
# make test-slow  the slow ones alone
# make test-all   both
# make lint   style and types
# make docs   builds docs/ to docs/_build/html; warnings are errors
# make notebooks   runs the notebooks and stores them with their outputs, minutes
# Another interpreter: make PYTHON=python3.13 run

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := test$(shell nvidia-smi >/dev/null 2>&1 && echo ,cuda12)

.PHONY: run test test-slow test-all lint docs notebooks setup clean

run: setup
	@$(BIN)/python -m ist_jax.main --config=configs/resnet.py --workdir=runs/digits

test: setup
	@$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal

test-all: test test-slow

test-slow: setup
	@$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal -m slow

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(VENV)/.docs
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --nitpicky docs docs/_build/html
	@echo "docs: docs/_build/html/index.html"

notebooks: setup
	@$(BIN)/python notebooks/renew.py

setup: $(VENV)/.installed

$(VENV)/.docs: $(VENV)/.installed
	@echo "installing ist_jax[docs] into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ist_jax needs Python 3.11 or newer; make PYTHON=... chooses one")'
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing ist_jax[$(EXTRAS)] into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]' >$(VENV)/pip.log 2>&1 || { cat $(VENV)/pip.log; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) docs/_build docs/generated *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache
