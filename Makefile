# Everything runs in .venv, which is made here. Needed beforehand: make, and Python 3.10 or later as `python3`.
#   make demo | test | test-slow | lint | bench | docs | clean

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PACKAGING := setup.cfg setup.py pyproject.toml constraints.txt pyro_seq/engine/native.cpp
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.NOTPARALLEL:
.PHONY: demo test test-slow lint bench docs clean

demo: $(VENV)/demo.stamp
	$(RUN) -m pyro_seq demo

test: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

test-slow: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m slow

lint: $(VENV)/lint.stamp
	$(RUN) -m ruff check .

bench: $(VENV)/bench.stamp
	$(RUN) -m benchmarks

docs: $(VENV)/docs.stamp
	$(RUN) -m sphinx -W --keep-going -b html docs docs/_build/html

clean:  # The environment stays; rm -rf .venv to be rid of it.
	rm -rf build dist *.egg-info docs/_build docs/tutorials .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# One stamp for each of the extras in setup.cfg; the demo needs none.
$(VENV)/demo.stamp: $(PACKAGING) | $(VENV)/venv.stamp
	$(INSTALL) .
	touch $@

$(VENV)/%.stamp: $(PACKAGING) | $(VENV)/venv.stamp
	$(INSTALL) '.[$*]'
	touch $@

$(VENV)/venv.stamp:
	$(PYTHON) -m venv $(VENV)
	touch $@
