# `make train` and `make test` set up .venv on a machine that has none. Options for either: ARGS="...".
PYTHON ?= python3
VENV ?= .venv
# Ranks of `make train` on a machine without a GPU; with GPUs there is one rank on each.
RANKS ?= 2
ARGS ?=
# Tests that `make test` runs at a time.
WORKERS ?= 2

BIN := $(abspath $(VENV))/bin
# The commands that a run says to type next are for the shell that called make.
export LEANSTATE_SHELL_PATH := $(PATH)
# DeepSpeed's launcher and its just-in-time builds look for python and ninja on the PATH.
export PATH := $(BIN):$(PATH)

.PHONY: install train test test-slow lint docs clean
.DEFAULT_GOAL := train

install: $(VENV)/.installed

# DeepSpeed's setup.py imports torch: torch is installed first, and the build sees it without isolation.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; give another: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch setuptools wheel hatchling editables
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@

train: $(VENV)/.installed
	@echo "loading PyTorch and DeepSpeed's launcher"
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.accelerator.is_available())'; then \
		deepspeed --quiet launch/train.py $(ARGS); \
	else \
		DS_ACCELERATOR=cpu deepspeed --quiet --num_gpus $(RANKS) launch/train.py $(ARGS); \
	fi

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow $(ARGS)

# The site is checked with the code: a page or a docstring that it warns of is an error.
lint: $(VENV)/.installed docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/sphinx-build -q -W --keep-going -c docs . build/docs

clean:
	rm -rf build docs/generated dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find toolkit launch tests -name __pycache__ -type d -prune -exec rm -rf {} +
