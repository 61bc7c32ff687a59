# make demo: post-train the embedded world; make test: everything CI checks. Each sets up .venv by itself.
# make sanitize: the operators' tests with the compiled module under AddressSanitizer and UBSan.
# make gpu-check: build, test and measure on a GPU, with $(PYTHON) as it is and without a network.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Waiting OpenMP threads must not spin: two cores are soon shared with something else.
export OMP_WAIT_POLICY ?= PASSIVE
SEED ?= 0
OUT ?= runs/demo-seed$(SEED)
VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test sanitize setup lint bench gpu-check clean

demo: setup
	$(BIN)/advflow train --config tiny --seed $(SEED) --out $(OUT) --resume

test: setup lint
	$(BIN)/python -m pytest -q -m "not slow and not gpu and not sanitizer"

sanitize: setup
	$(BIN)/python -m pytest -q -m sanitizer

setup: $(VENV)/.installed

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; PYTHON=... names another interpreter"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" setuptools wheel ninja
	touch $@

$(VENV)/.installed: $(VENV)/.torch python/pyproject.toml $(NATIVE)
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[dev]' --editable python
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp')

bench: setup
	$(BIN)/python -m bench

gpu-check:
	PYTHON="$(PYTHON)" bench/gpu.sh

clean:
	rm -rf $(VENV) build *.egg-info python/*.egg-info .pytest_cache .ruff_cache .mypy_cache advflow_ext/_C*.so
