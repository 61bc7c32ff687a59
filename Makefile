# Everything that is done here by one word; "make help" lists it. Each sets up .venv by itself but for gpu-check.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Waiting OpenMP threads must not spin: two cores are soon shared with something else.
export OMP_WAIT_POLICY ?= PASSIVE
SEED ?= 0
OUT ?= runs/demo-seed$(SEED)
VENV := .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest
DOCS := .venv-docs
# An op of each kind, what hooks into diffusers, PEFT and torch's compiler, and the trainer: what a new release of one of
# them can break, in minutes.
NEWEST_TESTS := tests/ops/test_advantage_flow.py tests/kernels/test_residual.py \
	tests/kernels/test_loss_summary.py tests/kernels/test_sde_step_op.py tests/nn/test_qk_norm.py \
	$(addprefix tests/patches/test_sd3.py::test_, tiny_model_with_adapters launches_of_one_training_step full_fine_tuning \
		infer_mode_runs_on_merged_weights_and_follows_the_adapters inside_peft_and_gradient_checkpointing \
		compiles_into_one_graph inside_fully_sharded_data_parallel what_is_not_covered_is_kept_and_said) \
	tests/trainer/test_train.py::test_a_run_leaves_everything_it_promises
# Both runs of the tests; a machine of many cores has no memory for one on each.
FAST := -m "not slow and not gpu and not sanitizer" --numprocesses auto --maxprocesses 8 --dist worksteal
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help demo test test-peers test-slow test-newest download-newest setup-newest sanitize coverage setup lint hooks docs docs-serve bench gpu-check wheels clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1	/' | expand -t 14

demo: setup ## post-train the embedded world: minutes on two cores, ends with a report
	$(BIN)/advflow train --config tiny --seed $(SEED) --out $(OUT) --resume

# Prerequisites inherit it: what CI builds has no warnings. A module that is there already is not built again.
test: export ADVFLOW_STRICT = 1
test: setup lint ## what CI checks: linters, types, and every test that needs no GPU and is not slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(FAST)

test-slow: setup ## the tests that `make test` leaves out for their length
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow and not gpu"

# Python alone: Triton's kernels and what runs in processes of its own are not seen.
coverage: setup ## what of the Python code the tests of `make test` run, line by line in build/coverage/index.html
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(FAST) --cov --cov-report=term:skip-covered --cov-report=html:build/coverage

sanitize: setup ## the operators' tests with the compiled module under AddressSanitizer and UBSan
	$(BIN)/python -m pytest -q -m sanitizer

test-peers: setup ## the contract of the integrations on the trainers' own code, PEERS=folder with their checkouts
	@test -d "$(PEERS)" || { echo "PEERS=folder names a folder with checkouts: see CONTRIBUTING.md"; exit 1; }
	PEERS="$(abspath $(PEERS))" $(BIN)/python -m pytest -q tests/integrations

# Not editable: the module in the tree is for the torch of .venv, and what a user installs is tested as it is installed.
test-newest: setup-newest ## a part of the tests with the newest torch (a CUDA build of several GB) and diffusers
	OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest -q -p no:cacheprovider $(FAST) $(NEWEST_TESTS)

setup-newest: $(NEWEST)/.installed

# All but our own packages: nothing in the tree is read or written, so it may run beside anything else.
download-newest: $(NEWEST)/.downloaded

$(NEWEST)/.downloaded: requirements-newest.txt python/pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(PYTHON) -c 'import tomllib; print(*[name for name in tomllib.load(open("python/pyproject.toml", "rb"))["project"]["dependencies"] if not name.startswith("advflow-ext")], sep="\n")' > $(NEWEST)/requirements.txt
	$(NEWEST)/bin/pip install --quiet --requirement requirements-newest.txt --requirement $(NEWEST)/requirements.txt
	touch $@

$(NEWEST)/.installed: $(NEWEST)/.downloaded $(NATIVE) $(shell find advflow_ext python/advflow -name '*.py')
	ADVFLOW_CUDA=0 $(NEWEST)/bin/pip install --quiet --no-build-isolation --force-reinstall --no-deps . ./python
	touch $@

setup: $(VENV)/.installed ## .venv with everything in it

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; PYTHON=... names another interpreter"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" setuptools wheel ninja
	touch $@

$(VENV)/.installed: $(VENV)/.torch python/pyproject.toml $(NATIVE)
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[dev]' --editable 'python[serve]'
	touch $@

lint: setup ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp')

hooks: setup ## `make lint` before every commit, by git itself
	$(BIN)/pre-commit install

docs: $(DOCS)/.installed ## the documentation site, into build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

docs-serve: $(DOCS)/.installed ## the site on this machine's port 8000, built anew when a page changes
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs serve

# The extra of pyproject.toml without the package itself, which needs torch.
$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(DOCS)/requirements.txt
	$(DOCS)/bin/pip install --quiet --requirement $(DOCS)/requirements.txt
	touch $@

bench: setup ## every op timed beside the public trainers and torch.compile, drawn in build/bench.html
	$(BIN)/python -m advflow_ext.bench --plot build/bench.html

gpu-check: ## build, test and measure on a GPU, with PYTHON=... as it is and without a network
	PYTHON="$(PYTHON)" bench/gpu.sh

wheels: ## wheels into dist/, tested, PAIRS="3.12:2.11.0 3.13:2.15.0" of Python and torch or all (one torch: several GB)
	$(PYTHON) csrc/wheels.py $(PAIRS)

clean: ## what was built or installed here
	rm -rf $(VENV) $(NEWEST) $(DOCS) build dist *.egg-info python/*.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage advflow_ext/_C*.so
