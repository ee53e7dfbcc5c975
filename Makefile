# `make` alone lists the targets. Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
DATA ?= data/emoji
RUN ?= runs/demo
PYTEST_ARGS ?=
JOBS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-lowest test-extras check format bench docs wheel audit clean
# An interrupted command must not cost the user a finished file.
.PRECIOUS: $(DATA)/test.json $(RUN)/adapter_model.safetensors $(RUN)/eval/emoji/final/results.json

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=python3.11 chooses the interpreter, RUN=runs/other the folder of the demo, JOBS=8 the tests at a time."

setup: $(INSTALLED)  ## make the virtual environment and install everything into it
	@echo "ready:  source $(BIN)/activate      (or type $(BIN)/python for python)"
	@echo "next:   make demo, or  milora --help"

demo: $(RUN)/.demo-finished  ## fine-tune a small LLaVA with MiLoRA, evaluate it before and after, write a report
	@echo "report: $(abspath $(RUN))/report.html"
	@echo "afresh: make demo RUN=runs/another     (or remove $(RUN) first)"

test: $(INSTALLED)  ## run the tests (minutes on a CPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

test-all: $(INSTALLED)  ## the slow tests too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not gpu" $(PYTEST_ARGS)

test-lowest: $(INSTALLED)  ## the tests with the oldest versions that pyproject.toml allows, in an environment of their own
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv venv --quiet --seed --clear --python $(BIN)/python .venv-lowest
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct -e ".[dev]"
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --no-deps llava-torch
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

EXTRAS_TESTS := tests/test_quantized.py tests/test_chat_web.py tests/test_trl.py tests/test_trl_collator.py tests/test_llava_scripts.py

test-extras: $(INSTALLED)  ## the tests of bitsandbytes, gradio and TRL, which `test` leaves out, in an environment of their own
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv venv --quiet --seed --clear --python $(BIN)/python .venv-extras
	$(BIN)/uv pip install --quiet --python .venv-extras/bin/python -e ".[dev,quant,web]" trl
	$(BIN)/uv pip install --quiet --python .venv-extras/bin/python --no-deps llava-torch
	.venv-extras/bin/python -m pytest -n $(JOBS) -m "not gpu" $(EXTRAS_TESTS) $(PYTEST_ARGS)

check: $(INSTALLED)  ## lint, format, types, import direction, spelling: all of them, then the verdict
	@status=0; for tool in "ruff check ." "ruff format --check ." mypy lint-imports codespell; do \
	    echo "$$tool"; $(BIN)/$$tool || status=1; done; exit $$status

format: $(INSTALLED)  ## rewrite the code the way `check` wants it
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(INSTALLED) $(DATA)/test.json  ## all benchmarks, one after the other (an hour): benchmarks/results.json, docs/performance.md
	$(BIN)/python benchmarks/all.py

docs: $(INSTALLED)  ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open $(abspath site)/index.html"

wheel: $(INSTALLED)  ## build the wheel and the source archive into dist/
	$(BIN)/python -m build --no-isolation

audit: $(INSTALLED)  ## known vulnerabilities in what is installed (needs the vulnerability database)
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --local --skip-editable

clean:  ## remove caches and built files (never runs, data or the environment)
	rm -rf build dist site .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache

# Debian's python3 comes without ensurepip; its pip can then install into the bare environment from outside.
# llava-torch is LLaVA's own code, the truth that our masks are tested against; its pins (torch 2.1) are not taken over.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: Python 3.10 or newer is needed, and '$(PYTHON)' is not one; name another:  make PYTHON=python3.11 ..." >&2; exit 2; }
	@test -x $(BIN)/pip || if $(PYTHON) -c 'from ensurepip import version' 2>/dev/null; then \
	    $(PYTHON) -m venv $(VENV); \
	  else \
	    $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; \
	  fi || { echo "error: no virtual environment could be made with '$(PYTHON)'; on Debian:  apt-get install python3-venv" >&2; exit 2; }
	@echo "installing into $(VENV) (minutes, the first time)"
	@$(BIN)/python -m pip install --quiet -e ".[dev]"
	@$(BIN)/python -m pip install --quiet --no-deps llava-torch
	@touch $@

# The demo is nothing but the public commands. Each step leaves a file, so an interrupted demo goes on where it stopped;
# order-only prerequisites (|) because a step is needed once, whatever the times of the files say.
$(DATA)/test.json: | $(INSTALLED)
	$(BIN)/python -m milora_data emoji --output_dir $(DATA)

$(RUN)/adapter_model.safetensors: | $(DATA)/test.json
	$(BIN)/python -m milora_vl.train --recipe smol-llava-demo --output_dir $(RUN) --resume_from_checkpoint auto

$(RUN)/eval/emoji/final/results.json: | $(RUN)/adapter_model.safetensors
	$(BIN)/python -m milora_eval run --model smol-llava --adapter $(RUN) --suite emoji --data $(DATA) --with_base --dtype fastest --output_dir $(RUN)

$(RUN)/.demo-finished: | $(RUN)/eval/emoji/final/results.json
	$(BIN)/python -m milora_vl.chat --model smol-llava --adapter $(RUN) --image $(DATA)/images/$(FIRST_PICTURE) "What is this?"
	$(BIN)/python -m milora_vl.report $(RUN)
	@touch $@

FIRST_PICTURE = $(shell $(BIN)/python -c "import json; print(next(r['image'] for r in json.load(open('$(DATA)/test.json')) if 'image' in r))")
