# Shortcuts; each target is one command that you can type yourself.
PYTHON ?= python3
VENV_PYTHON = $(or $(CELLSEG_VENV),.venv)/bin/python

.PHONY: setup demo test test-browser test-gpu check fmt

setup:  ## install into .venv
	$(PYTHON) tools/bootstrap.py setup

demo:  ## install, make sample data, train two folds, ensemble, score, draw
	$(PYTHON) tools/bootstrap.py demo

test:  ## install, run the tests
	$(PYTHON) tools/bootstrap.py test

test-browser: setup  ## the report in a headless Chromium; fails where there is none
	CELLSEG_REQUIRE_BROWSER=1 $(VENV_PYTHON) -m pytest -q tests/test_report.py

check: setup  ## lint
	$(VENV_PYTHON) -m pip install -q -c constraints.txt ruff mypy
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

fmt: setup  ## format
	$(VENV_PYTHON) -m pip install -q -c constraints.txt ruff
	$(VENV_PYTHON) -m ruff format .
