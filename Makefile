# Shortcuts; each target is one command that you can type yourself.
PYTHON ?= python3
VENV_PYTHON = $(or $(CELLSEG_VENV),.venv)/bin/python

.PHONY: setup light demo test test-browser test-gpu test-slow faults fuzz wild check fmt

setup:  ## install into .venv
	$(PYTHON) tools/bootstrap.py setup

light:  ## install what predicting with models in files needs, no torch
	$(PYTHON) tools/bootstrap.py light

demo:  ## install, make sample data, train two folds, ensemble, score, draw
	$(PYTHON) tools/bootstrap.py demo

test:  ## install, run the tests
	$(PYTHON) tools/bootstrap.py test

test-browser: setup  ## the report and the page of a model in a headless Chromium; fails without
	CELLSEG_REQUIRE_BROWSER=1 $(VENV_PYTHON) -m pytest -q tests/report/test_report.py \
	  tests/exporting/test_html_page.py

test-gpu: setup  ## the CUDA paths; fails where there is no CUDA device
	CELLSEG_REQUIRE_GPU=1 $(VENV_PYTHON) -m pytest -m gpu

test-slow: setup  ## cross-validation killed at three random moments, to the same end
	$(VENV_PYTHON) -m pytest -q tests/whole/slow_cross_validation.py

faults: setup  ## kill -9 each job at random moments until it ends, 50 times
	$(VENV_PYTHON) -m tests.faults.kill

fuzz: setup  ## 20,000 damaged files for the readers
	$(VENV_PYTHON) -m tests.fuzz.run --cases 20000

wild: setup  ## read every image of the packages (and of FOLDER=...) as libvips, Pillow, OpenSlide do
	$(VENV_PYTHON) -m pip install -q pyvips pyvips-binary openslide-python openslide-bin
	$(VENV_PYTHON) -m tests.wild.read_all $(FOLDER)

check:  ## ruff, and mypy on the wings without torch; `make test` begins with it
	$(PYTHON) tools/bootstrap.py check

fmt: setup  ## format
	$(VENV_PYTHON) -m ruff format .
