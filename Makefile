# Everything runs in .venv, which is made on first use: with requirements.txt for the commands that only use the kernel,
# with requirements-dev.txt as well for those that test it.
#     make PYTHON=python3.12 demo    makes .venv with this Python, 3.11 to 3.13
#     make VENV=path/to/env demo     takes an environment of yours as it is; so does PYTHON=path/to/env/bin/python
#     make demo MODEL=path/or/id     takes your checkpoint, not a small one with random weights
#     make quantize MODEL=path OUT=path [FORMAT=fp4] [LINEAR=1] [DEVICE=cuda]    to fp8, or to 4 bits
#     make finetune EXPERTS=fp4      holds the experts in 4 bits
#     make test FULL=1               compiles for every GPU with every Triton of the table
#     make test SEED=7               draws other numbers

# Of path/to/env/bin/python, if that is an environment's.
CFG := $(wildcard $(patsubst %/bin/,%/pyvenv.cfg,$(filter %/bin/,$(dir $(PYTHON)))))
override VENV := $(or $(VENV),$(CFG:/pyvenv.cfg=))
ifeq ($(VENV),)
  python := .venv/bin/python
  RUNTIME := .venv/.requirements.txt
  DEVELOPMENT := .venv/.requirements-dev.txt
  # For the compile check: the oldest Triton that we support and those of the next versions of PyTorch.
  TRITONS := $(addprefix .venv/triton-,3.6.0 3.8.0 3.9.0)
else
  python := $(firstword $(wildcard $(VENV)/bin/python $(VENV)/bin/python3))
  $(if $(python),,$(error VENV=$(VENV): there is no bin/python in it))
endif

.PHONY: venv environments versions build style test repeats bench plot tune demo finetune quantize again

venv: $(DEVELOPMENT) $(TRITONS)

# A PYTHON that is given may be another than that of the .venv which is there.
.venv/.requirements.txt: requirements.txt $(if $(PYTHON),again)
	@$(or $(PYTHON),python3) scripts/environment.py .venv $<

.venv/.requirements-dev.txt: requirements-dev.txt .venv/.requirements.txt
	.venv/bin/python -m pip --disable-pip-version-check install --requirement $<
	touch $@

.venv/triton-%: | .venv/.requirements-dev.txt
	.venv/bin/python -m pip --disable-pip-version-check install --no-deps --target $@ triton==$*

# One for each supported Transformers; PyTorch and the rest are shared. Without them, test_versions.py is skipped.
environments: $(DEVELOPMENT)
	$(python) scripts/versions.py

versions: environments
	$(python) -m pytest tests/process/test_versions.py

build: $(RUNTIME)
	$(python) scripts/build.py

style: $(DEVELOPMENT)
	$(python) -m ruff check
	$(python) -m ruff format --check

test: style $(TRITONS)
	$(python) -m pytest -n auto --dist worksteal $(if $(FULL),,-m "not matrix") $(if $(SEED),--seed $(SEED))

# Those that compare numbers with an oracle, on the CPU, each time with others.
ORACLE_TESTS := $(patsubst %,tests/experts/test_%.py,moe_experts lora router building_blocks training) tests/weights
repeats: $(DEVELOPMENT) build
	for seed in $$(seq 50); do $(python) -m pytest -q -m "not gpu" -n auto --seed $$seed $(ORACLE_TESTS) || exit; done

bench: build
	$(python) benchmarks/layer.py
	$(python) benchmarks/generate.py
	$(python) benchmarks/plot.py

plot: $(RUNTIME)
	$(python) benchmarks/plot.py

# The second build puts the new configurations to use.
tune: build
	$(python) scripts/tune.py
	$(python) scripts/build.py

demo: build
	$(python) examples/demo.py $(if $(MODEL),--model "$(MODEL)")

finetune: build
	$(python) examples/finetune_lora.py $(if $(EXPERTS),--experts $(EXPERTS))

# Before .venv is made: what is missing can be said at once.
ifneq ($(filter quantize,$(MAKECMDGOALS)),)
  $(if $(and $(MODEL),$(OUT)),,$(error MODEL or OUT is missing: make quantize MODEL=path/to/model OUT=path/to/model-fp8))
endif
quantize: OPTIONS = $(if $(FORMAT),--format $(FORMAT)) $(if $(LINEAR),--linear) $(if $(DEVICE),--device $(DEVICE))
quantize: build
	$(python) examples/quantize_checkpoint.py "$(MODEL)" "$(OUT)" $(strip $(OPTIONS))
