# Needs: Python >= 3.10 with venv, and PyPI. Everything is installed into $(VENV), nothing outside it.
#   make test PYTHON=python3.12 VENV=/tmp/venv PYTEST_ARGS="-k layout"
#   make finetune ARGS="--compare adamw"
#   SGC_SHARED_DATA=folder make bench-quality ARGS="--suite instruct sst2 --table"
#   make finetune ACCELERATE_ARGS="--config_file recipes/configs/..." TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BENCH_ARGS ?=
ACCELERATE_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= auto
TORCH_ARGS ?=

SHELL := /bin/sh
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -c constraints.txt
# setuptools warns about every editable install
INSTALL_SGC := PYTHONWARNINGS=ignore $(INSTALL) -q --no-build-isolation -e

.DEFAULT_GOAL := help
.PHONY: help finetune test test-matrix bench-quality bench-memory bench-memory-h200 lint format clean
.DELETE_ON_ERROR:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' Makefile

finetune: $(VENV)/.installed-hf ## Fine-tune a small Llama with SGC (ARGS="..." goes to recipes/finetune.py)
	$(BIN)/accelerate launch $(ACCELERATE_ARGS) recipes/finetune.py $(ARGS)

test: $(VENV)/.installed-dev ## Run the tests (PYTEST_ARGS="-k name", WORKERS=1)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

test-matrix: $(VENV)/.installed-dev ## Run every harness with every feature, and write the table of README.md
	WORKERS=$(WORKERS) $(BIN)/python -m tests.compatibility

bench-quality: $(VENV)/.installed-bench ## Compare optimizers by what they learn (ARGS="--suite instruct --table")
	$(BIN)/python benchmarks/quality.py $(ARGS)

bench-memory: $(VENV)/.installed-bench ## Measure what a step holds, beside what is planned (ARGS="--suite medium", --table, --plot)
	$(BIN)/python benchmarks/memory.py $(ARGS)

bench-memory-h200: ## The same of Llama-3-8B's shape on a GPU, within 8 minutes (PYTHON=python3, ARGS="--snapshot F")
	$(PYTHON) benchmarks/memory.py --suite llama-3-8b $(ARGS)

bench: $(VENV)/.installed-bench ## Time a step and its stages on this CPU (BENCH_ARGS="--smoke"), an hour with all peers
	for name in step sparsify project recover train growth; do $(BIN)/python benchmarks/bench_$$name.py $(BENCH_ARGS) || exit 1; done

# Installs nothing, so that it runs where there is no internet: PYTHON is one that has torch, triton and pytest.
bench-gpu: ## Test the kernels on this GPU, then time them, within 8 minutes (PYTHON=python3, BENCH_ARGS="--smoke")
	PYTHON=$(PYTHON) sh benchmarks/gpu.sh $(BENCH_ARGS)

lint: $(VENV)/.installed-dev ## Style, types and the one-way imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## Apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what was built, and the default .venv
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so an interrupted install is taken up again. A half-made environment is thrown away only
# if this Makefile began it (the .incomplete mark): VENV may name an environment of the user's own.
$(VENV)/.installed-torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "sgc needs Python 3.10 or newer, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1); choose one with: make PYTHON=python3.12" >&2; exit 1; }
	@if [ -e $(VENV)/.incomplete ]; then rm -rf $(VENV); fi
	@if [ ! -x $(BIN)/python ]; then \
	    echo "Making $(VENV)"; mkdir -p $(VENV) && touch $(VENV)/.incomplete && $(PYTHON) -m venv $(VENV) && rm $(VENV)/.incomplete; fi
	@echo "Installing torch into $(VENV)"
	$(INSTALL) -q --upgrade pip setuptools
	$(INSTALL) $(TORCH_ARGS) torch
	@touch $@

$(VENV)/.installed-hf: $(VENV)/.installed-torch pyproject.toml constraints.txt
	@echo "Installing sgc and what its recipes need into $(VENV)"
	$(INSTALL_SGC) '.[hf]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-torch pyproject.toml constraints.txt
	@echo "Installing sgc and what it is compared with into $(VENV)"
	$(INSTALL_SGC) '.[bench,numba]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-torch pyproject.toml constraints.txt
	@echo "Installing sgc and what its tests need into $(VENV)"
	$(INSTALL_SGC) '.[dev]'
	@touch $@
