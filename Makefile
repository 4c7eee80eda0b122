# `make demo` shows the whole thing on the shipped sample; `make test` runs the suite. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
HF_BASE ?= python3.11
HF_VENV ?= .venv-hf
TPU_VENV := .venv-tpu
# Huge pages for what XLA allocates: without them a tenth to a fifth of training on a CPU goes into page faults.
# Known to glibc 2.35 and newer on Linux; nothing else takes notice.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-slow test-kernels test-hf lint clean setup bench studies aot plan

demo: setup
	$(BIN)/python -m t5x_domain.demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" tests

# What `test` leaves out for want of time: tests/slow.txt.
test-slow: setup
	$(BIN)/python -m pytest -n 2 -m slow tests

# Twenty times the examples of attention that `test` tries: a quarter of an hour.
test-kernels: setup
	EXAMPLES=20 $(BIN)/python -m pytest -n 2 tests/kernels tests/parallel

# transformers lives in an environment of its own: torch and JAX are not always at hand for the same Python.
# FLAN_T5_SMALL names a Hugging Face folder of that model, T5X_TESTDATA the folder t5x/testdata of T5X's repository; what
# needs them is skipped without.
test-hf: setup $(HF_VENV)/.ready
	HF_PYTHON=$(abspath $(HF_VENV))/bin/python $(BIN)/python -m pytest -rs tests/hf tests/conversion/test_t5x.py

$(HF_VENV)/.ready:
	$(HF_BASE) -m venv $(HF_VENV)
	@echo "installing torch and transformers into $(HF_VENV) ..."
	$(HF_VENV)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
	@touch $@

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# With FLAN_T5_SMALL also what needs that model, and torch beside it.
bench: setup $(if $(FLAN_T5_SMALL),$(HF_VENV)/.ready)
	$(BIN)/python benchmarks/data_pipeline.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/objectives.py
	$(BIN)/python benchmarks/train_step.py
	$(if $(FLAN_T5_SMALL),$(BIN)/python benchmarks/decode.py --model $(FLAN_T5_SMALL) --torch_python $(HF_VENV)/bin/python)

# What can be shown of TPUs without one: libtpu compiles for them on any machine. Attention's cost in instruction bundles
# against tokamax's, its programs for each chip, whole train steps, and what fsdp sends. Fails where a limit is passed. A quarter of an
# hour on two cores that nothing else uses, half of it the train steps.
aot: $(TPU_VENV)/.ready
	$(TPU_VENV)/bin/python benchmarks/tpu_static_cost.py --peer
	$(TPU_VENV)/bin/python benchmarks/tpu_aot.py --lengths 512 8192 --head_dims 128
	$(TPU_VENV)/bin/python benchmarks/tpu_aot.py --models
	$(TPU_VENV)/bin/python benchmarks/tpu_fsdp.py

# Train steps of T5 and UL2 compiled for up to 1,024 TPU chips: memory, traffic, bounds. Two hours on two cores that
# nothing else uses; what the result already has is not compiled again.
plan: $(TPU_VENV)/.ready
	$(TPU_VENV)/bin/python benchmarks/plan_table.py

$(TPU_VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(TPU_VENV)
	@echo "installing jax[tpu], tokamax and t5x_domain into $(TPU_VENV) ..."
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(TPU_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt "jax[tpu]==0.11.2" libtpu==0.0.48.1 tokamax==0.0.17 -e .
	@touch $@

# An hour or so; docs/studies/ holds what they write. case_study.py, long.py, rtd.py and synonyms.py want corpora or a model.
studies: setup
	$(BIN)/python benchmarks/studies/ul2_ablation.py
	$(BIN)/python benchmarks/studies/meco.py

setup: $(READY)

# The constraints hold for what builds packages, too: seqeval comes as source, and its setuptools_scm must be one of
# those that stand alone. Which of the two variables is read depends on the version of pip.
$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
	  echo "t5x_domain needs Python 3.12 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | cut -d' ' -f2)." \
	       "Install one and run: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about two minutes) ..."
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
