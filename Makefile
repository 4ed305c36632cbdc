# make demo: the main job, start to end.  make test: the test suite.  Both make the environment first.
PYTHON ?= python3
BIN := .venv/bin
NAME ?= loop
ARGS ?=
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONUNBUFFERED := 1

.PHONY: setup demo test lint bench wheel clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "making .venv (about two minutes, 2 GB)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup
	$(BIN)/nightschool demo

test: setup
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .venv/typed && ln -sfn ../.. .venv/typed/nightschool
	$(BIN)/mypy

bench: setup
	$(BIN)/python bench/$(NAME).py $(ARGS)

wheel: setup
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf .venv build dist *.egg-info
