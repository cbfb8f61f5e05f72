# Everything runs in .venv, which is made on first use from requirements-dev.txt. To use an environment of your own:
#     make PYTHON=python3 test
# make demo MODEL=path takes your checkpoint instead of writing a small one.

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(if $(filter $(VENV)/%,$(PYTHON)),$(VENV)/.installed)

.PHONY: venv environments versions build style test bench plot tune demo finetune quantize

venv: $(READY)

# The compile check needs the oldest and the newest Triton that we support, besides the one that torch runs with.
$(VENV)/.installed: requirements-dev.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -r requirements-dev.txt
	$(PYTHON) -m pip install --no-deps --upgrade --target $(VENV)/triton-3.6.0 triton==3.6.0
	$(PYTHON) -m pip install --no-deps --upgrade --target $(VENV)/triton-3.9.0 triton==3.9.0
	touch $@

# One for each supported Transformers; PyTorch and the rest are shared. Without them, tests/test_versions.py is skipped.
environments: $(READY)
	$(PYTHON) scripts/versions.py

versions: environments
	$(PYTHON) -m pytest tests/test_versions.py

build: $(READY)
	$(PYTHON) scripts/build.py

style: $(READY)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

test: style
	$(PYTHON) -m pytest -n auto

bench: build
	$(PYTHON) benchmarks/benchmark_moe.py
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
