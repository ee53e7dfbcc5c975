# `make` alone lists the targets. Everything runs in a separate virtual environment, created on first use.
PYTHON ?= python3
VENV ?= .venv
DATA ?= data/emoji
RUN ?= runs/demo
PYTEST_ARGS ?=
GPU_ARGS ?=
JOBS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# With it, each program would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-thorough test-all test-lowest test-extras check format peers bench bench-full bench-quick gpu docs wheel clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=python3.11 sets the interpreter, RUN=runs/other the folder of the demo, JOBS=8 the number of parallel tests."

setup: $(INSTALLED)  ## Create the virtual environment and install everything
	@echo "ready:  source $(BIN)/activate      (or type $(BIN)/python for python)"
	@echo "next:   make demo, or  milora --help"

demo: $(INSTALLED)  ## Fine-tune a small LLaVA, evaluate it before and after, write a report, in about five minutes on two quiet cores
	$(BIN)/python -m milora_vl.demo --output_dir $(RUN)
	@echo "again:  make demo RUN=runs/another     (or remove $(RUN) first)"

test: $(INSTALLED)  ## Run the tests (minutes on a CPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --ignore tests/project $(PYTEST_ARGS)

test-thorough: $(INSTALLED)  ## Run the further cases that `test` and CI leave out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "thorough and not slow and not gpu" $(PYTEST_ARGS)

test-all: $(INSTALLED)  ## Run every test that needs no GPU, also the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not gpu" $(PYTEST_ARGS)

test-lowest: $(INSTALLED)  ## Run the tests with the oldest versions that pyproject.toml allows, in a separate environment
	$(BIN)/uv venv --quiet --seed --clear --python $(BIN)/python .venv-lowest
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct -e ".[dev]"
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --no-deps llava-torch
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

# Packages that no extra names: TRL, transformers' server, SmolVLM's numbers.
EXTRAS_PACKAGES := trl liger-kernel "transformers[serving]" num2words
EXTRAS_TESTS := tests/core/adapter/test_quantized.py tests/core/adapter/test_earlier.py tests/chat/test_chat.py \
    tests/chat/test_vlm_chat.py tests/interop/test_trl.py \
    tests/train/recipe/test_llava_scripts.py tests/export/test_serving.py \
    tests/train/test_vlm_train.py tests/data/test_videos.py tests/train/test_gpu_options.py

test-extras: $(INSTALLED)  ## Run the tests of optional packages, which `test` skips, in a separate environment
	$(BIN)/uv venv --quiet --seed --clear --python $(BIN)/python .venv-extras
	$(BIN)/uv pip install --quiet --python .venv-extras/bin/python -e ".[dev,quant]" $(EXTRAS_PACKAGES)
	$(BIN)/uv pip install --quiet --python .venv-extras/bin/python --no-deps llava-torch
	.venv-extras/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not gpu" $(EXTRAS_TESTS) $(PYTEST_ARGS)

check: $(INSTALLED)  ## Check lint, format, types, imports, spelling, pages and site; fail after all have run
	@$(BIN)/mypy > $(VENV)/mypy.log 2>&1 & types=$$!; status=0; \
	    for tool in "ruff check ." "ruff format --check ." lint-imports codespell; do \
	    echo "$$tool"; $(BIN)/$$tool || status=1; done; \
	    OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/project || status=1; \
	    wait $$types || status=1; echo mypy; cat $(VENV)/mypy.log; exit $$status

format: $(INSTALLED)  ## Fix lint and format in place
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# One peer of the benchmarks is TRL, which the project does not need.
peers: $(INSTALLED)
	$(BIN)/python -m pip install --quiet trl

bench: peers $(DATA)/test.json  ## Run the benchmarks (twenty minutes), write benchmarks/results.json and docs/performance.md
	$(BIN)/python benchmarks/all.py

bench-full: peers $(DATA)/test.json  ## Also run a 7B at full size, the demo and a start (an hour more)
	$(BIN)/python benchmarks/all.py --full

bench-quick: peers $(DATA)/test.json  ## Run the headline benchmarks (a quarter of an hour): factors, a step, the loss, a whole training
	$(BIN)/python benchmarks/all.py --quick

gpu: peers  ## Test and measure on this machine's GPU, write benchmarks/gpu.json
	$(BIN)/python -m pip install --quiet -e ".[quant]" liger-kernel
	$(BIN)/python -m benchmarks.gpu $(GPU_ARGS)

docs: $(INSTALLED)  ## Build the documentation site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open $(abspath site)/index.html"

wheel: $(INSTALLED)  ## Build the wheel and the source archive in dist/
	$(BIN)/python -m build --no-isolation

clean:  ## Remove caches and built files (never runs, data or the environment)
	rm -rf build dist site .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache

# Debian's python3 lacks ensurepip; there, the system's pip installs pip into the bare environment.
# llava-torch is LLaVA's own code, the reference for the mask tests; --no-deps ignores its pins (torch 2.1).
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: '$(PYTHON)' is not Python 3.10 or newer; set another interpreter:  make PYTHON=python3.11 ..." >&2; exit 2; }
	@test -x $(BIN)/pip || if $(PYTHON) -c 'from ensurepip import version' 2>/dev/null; then \
	    $(PYTHON) -m venv $(VENV); \
	  else \
	    $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; \
	  fi || { echo "error: '$(PYTHON)' cannot create a virtual environment; on Debian:  apt-get install python3-venv" >&2; exit 2; }
	@echo "installing into $(VENV) (minutes, the first time)"
	@$(BIN)/python -m pip install --quiet -e ".[dev]"
	@$(BIN)/python -m pip install --quiet --no-deps llava-torch
	@touch $@

$(DATA)/test.json: | $(INSTALLED)
	$(BIN)/python -m milora_data emoji --output_dir $(DATA)
