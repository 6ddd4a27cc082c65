# make compress [MODEL=smollm2-135m] [BUDGET=2.5] [OUT=folder] [CALIB=text or datasets id] [ARGS="more options"]
PYTHON ?= python3
MODEL ?= smollm2-135m
BUDGET ?= 2.5
OUT ?=
CALIB ?=
TEXT ?=
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready

# a word of the shell, whatever it holds
quote = '$(subst ','\'',$(1))'

# KVFOLD_TESTS=nightly make test ARGS="-m 'not real'" runs every case, and other random ones each time
.PHONY: help compress eval bench ablation domains test serving mutations fuzz kills curve processes lint typecheck wheel clean
.DEFAULT_GOAL := help

help:  ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## ?/\1\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kvfold needs Python 3.11 or newer, $(PYTHON) is older; say make PYTHON=python3.11 …" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

compress: $(READY)  ## compress MODEL under BUDGET and print the artifact's path
	@$(BIN)/kvfold compress $(call quote,$(MODEL)) --budget $(call quote,$(BUDGET)) $(if $(OUT),--out $(call quote,$(OUT))) $(if $(CALIB),--calib $(call quote,$(CALIB))) $(ARGS)

eval: $(READY)  ## measure the artifact OUT (default: what `make compress` writes) on TEXT
	@$(BIN)/kvfold eval $(if $(OUT),$(call quote,$(OUT)),"$$($(BIN)/python -m kvfold.compress.naming $(call quote,$(MODEL)) $(call quote,$(BUDGET)))") $(if $(TEXT),--text $(call quote,$(TEXT))) $(ARGS)

bench: $(READY)  ## the README's table: budgets 2.3, 3.0 and 4.5 of MODEL and its rivals, measured on TEXT
	@$(BIN)/kvfold bench quality $(call quote,$(MODEL)) --budgets 2.3,3.0,4.5 $(if $(TEXT),--text $(call quote,$(TEXT))) $(ARGS)

ablation: $(READY)  ## what each ingredient of the default recipe is worth: MODEL, or two models; goes on where it stopped
	@$(BIN)/python benchmarks/ablation.py $(if $(filter file,$(origin MODEL)),,$(call quote,$(MODEL))) $(if $(TEXT),--text $(call quote,$(TEXT))) $(ARGS)

domains: $(READY)  ## calibrate MODEL on one domain, test on the others
	@$(BIN)/python benchmarks/domains.py $(call quote,$(MODEL)) $(ARGS)

test: $(READY)  ## run the tests
	@$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

serving:  ## the tests of serving by vLLM, in .venv-serving; a word and no failure where it can't be installed
	@PYTHON=$(PYTHON) .ci/serving $(ARGS)

mutations: $(READY)  ## break 28 delicate lines, one at a time: the tests must see each
	@$(BIN)/python tests/mutations.py $(ARGS)

fuzz: $(READY)  ## 20,000 damaged artifacts, saved caches, GGUFs and work folders: each is refused in a sentence or changes nothing
	@PYTHONPATH=tests:tests/helpers OMP_NUM_THREADS=1 $(BIN)/python -m fuzz $(ARGS)

kills: $(READY)  ## kill runs at 40 random moments, of every fourth one of two processes: --resume ends with the same bytes
	@PYTHONPATH=tests:tests/helpers OMP_NUM_THREADS=1 $(BIN)/python -m fuzz.kills $(ARGS)

curve: $(READY)  ## peak memory and time of compressing random models of 1B, 3B and 7B that are read layer by layer; hours
	@$(BIN)/python benchmarks/memory_curve.py --max-memory 8GiB --recipe benchmarks/few_tokens.yaml $(ARGS)

processes: $(READY)  ## the tests of several processes: they compress and generate what one does
	@$(BIN)/python -m pytest tests/compress/test_processes.py tests/compress/test_local.py tests/runtime/test_tensor_parallel.py $(ARGS)

lint: $(READY)  ## ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

typecheck: $(READY)  ## mypy
	@$(BIN)/mypy

# from an empty build folder: setuptools would take up what an earlier build left there
wheel: $(READY)  ## dist/kvfold-*.whl, which pip installs anywhere
	@rm -rf build dist/kvfold-*.whl
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@rm -rf build && ls dist/kvfold-*.whl

clean:  ## remove .venv, caches and build output; artifacts stay
	rm -rf .venv .venv-serving build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
