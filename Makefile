# Everything runs in .venv, which is made on first use from requirements-dev.txt. To use an environment of your own:
#     make PYTHON=python3 test
# make demo MODEL=path takes your checkpoint instead of writing a small one.
# make test FULL=1 compiles for every GPU with every Triton of the table; make test SEED=7 draws other numbers.

VENV := .venv
PYTHON := $(VENV)/bin/python
# For the compile check: the oldest Triton that we support and those of the next versions of PyTorch, besides its own.
TRITONS := $(addprefix $(VENV)/triton-,3.6.0 3.8.0 3.9.0)
READY := $(if $(filter $(VENV)/%,$(PYTHON)),$(VENV)/.installed $(TRITONS))

.PHONY: venv environments versions build style test repeats bench plot tune demo finetune quantize

venv: $(READY)

$(VENV)/.installed: requirements-dev.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -r requirements-dev.txt
	touch $@

$(TRITONS): $(VENV)/triton-%: | $(VENV)/.installed
	$(PYTHON) -m pip install --no-deps --target $@ triton==$*

# One for each supported Transformers; PyTorch and the rest are shared. Without them, test_versions.py is skipped.
environments: $(READY)
	$(PYTHON) scripts/versions.py

versions: environments
	$(PYTHON) -m pytest tests/process/test_versions.py

build: $(READY)
	$(PYTHON) scripts/build.py

style: $(READY)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

test: style
	$(PYTHON) -m pytest -n auto --dist worksteal $(if $(FULL),,-m "not matrix") $(if $(SEED),--seed $(SEED))

# Those that compare numbers with an oracle, on the CPU, each time with others.
ORACLE_TESTS := $(patsubst %,tests/experts/test_%.py,moe_experts lora router building_blocks training) tests/weights
repeats: build
	for seed in $$(seq 50); do $(PYTHON) -m pytest -q -m "not gpu" -n auto --seed $$seed $(ORACLE_TESTS) || exit; done

bench: build
	$(PYTHON) benchmarks/layer.py
	$(PYTHON) benchmarks/generate.py
	$(PYTHON) benchmarks/plot.py

plot: $(READY)
	$(PYTHON) benchmarks/plot.py

# The second build puts the new configurations to use.
tune: build
	$(PYTHON) scripts/tune.py
	$(PYTHON) scripts/build.py

demo: build
	$(PYTHON) examples/demo.py $(if $(MODEL),--model $(MODEL))

# make quantize MODEL=path OUT=path: a local checkpoint with its experts in fp8.
quantize: build
	$(PYTHON) examples/quantize_checkpoint.py $(MODEL) $(OUT)

finetune: build
	$(PYTHON) examples/finetune_lora.py
