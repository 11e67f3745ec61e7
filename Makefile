# `make help` lists what there is. ARGS is handed on: make align ARGS='--name mine', make lab ARGS=--no-browser, make test ARGS='-k paths'.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
# The stamp says that .venv holds what the files below ask for. It carries the folder's own name, so a moved or copied checkout is noticed.
STAMP := .venv/.installed-$(shell pwd -P | cksum | cut -d' ' -f1)

.PHONY: help align lab test notebooks docs venv hooks constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

align: $(STAMP) ## align the pocket model by the default constitution and write a report
	@$(BIN)/cai-course align $(ARGS)

# JupyterLab hides stored pictures and tables of notebooks that it does not trust; whoever runs this Makefile trusts the course.
lab: $(STAMP) ## open the course in JupyterLab
	@$(BIN)/jupyter-trust nbs/index.ipynb nbs/*.ipynb nbs/tools/*.ipynb >/dev/null 2>&1 &
	@$(PY) -m jupyterlab --ServerApp.root_dir='$(CURDIR)' --LabApp.default_url=/lab/tree/nbs/index.ipynb $(ARGS)

test: $(STAMP) ## check that notebooks and library agree, run every notebook and every test
	@$(PY) -m pytest $(ARGS)

notebooks: $(STAMP) ## run the notebooks again and store their outputs (ARGS: which ones)
	@$(PY) tools/run_notebooks.py $(ARGS)

docs: $(STAMP) ## build the docs site into _docs/: with Quarto if it is on PATH, else with Sphinx
	@$(PY) tools/docs_site.py $(ARGS)

venv: $(STAMP) ## create or update .venv without running anything

hooks: ## check notebooks before every commit in this checkout
	git config core.hooksPath .githooks

constraints: ## write constraints.txt anew from what .venv holds now
	$(PY) tools/freeze.py > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean: ## remove what can be made again (never runs/, work/ or .venv)
	rm -rf build dist _docs _proc *.egg-info .pytest_cache .hypothesis
	find . \( -name .venv -o -path ./work -o -path ./runs \) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "make: $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing);" \
	"the course needs Python 3.10 or newer. Name one that you have: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@rm -f .venv/.installed-*
	@echo "Installing the course into .venv (only the first time, and when its requirements change) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
