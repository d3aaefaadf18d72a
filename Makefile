# `make demo` and `make test` set everything up by themselves, in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
# What pip may not go beyond: by default a CPU build of torch. For a GPU: make test CONSTRAINTS=
CONSTRAINTS ?= constraints-cpu.txt
WORKERS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test quality style docs clean

demo: $(READY)
	$(BIN)/optimum-cli dsa demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/doc-builder build optimum_dsa docs/source --build_dir build/docs --repo_name optimum-dsa --version main --version_tag_suffix "" --clean

clean:
	rm -rf $(VENV) build dist *.egg-info

$(READY): setup.cfg pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[tests,quality,docs]'
	touch $(READY)
