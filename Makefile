# Two targets matter: `make test` and `make lab`. All make the environment first, and reuse it afterwards.
SHELL := /bin/bash
PYTHON_BIN := .venv/bin

.PHONY: help env test lab docs export

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env:  ## make .venv and install the project (does nothing when up to date)
	@bash scripts/environment.sh

test: env  ## notebooks in step, run top to bottom, import rule, pytest
	@$(PYTHON_BIN)/python -m pytest

lab: env  ## open the notebooks in JupyterLab
	@PATH="$(CURDIR)/$(PYTHON_BIN):$$PATH" jupyter lab --notebook-dir=$(CURDIR) nbs/index.ipynb

docs: env  ## build the documentation site in _docs/html (adds Sphinx to .venv; no network afterwards)
	@bash scripts/environment.sh docs
	@$(PYTHON_BIN)/python docs/build.py

export: env  ## after editing notebooks or presets: clean, export the package, write README.md, report/final_report.md and configs/
	@PATH="$(CURDIR)/$(PYTHON_BIN):$$PATH" nbdev_clean
	@PATH="$(CURDIR)/$(PYTHON_BIN):$$PATH" nbdev_export
	@$(PYTHON_BIN)/python scripts/readme.py
	@$(PYTHON_BIN)/python scripts/final_report.py
	@$(PYTHON_BIN)/python scripts/presets.py
