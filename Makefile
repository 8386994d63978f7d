SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Python that makes .venv, and that runs the gpu- targets with the torch it has.
PYTHON ?= python3
# Test processes at a time.
WORKERS ?= 2
# Seconds that gpu-bench may take, and the folder that the gpu- targets write to.
BUDGET ?= 300
OUT ?= build/gpu

VENV := .venv/bin/python
NATIVE := $(shell find csrc tests/simt -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
EXTENSION := setup.py pyproject.toml $(filter csrc/%,$(NATIVE))
GPU_LIMIT := timeout --kill-after=10 470

.PHONY: help venv build bench test zoo lint format simt kernel-report coverage clean gpu-build gpu-test gpu-sanitize gpu-bench

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' Makefile | expand -t 16

venv: .venv/installed  ## .venv with everything in requirements/

.venv/installed: $(wildcard requirements/*.txt)
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install $(foreach file,$^,-r $(file))
	touch $@

build: .venv/installed  ## install fused_cna into .venv, editable, with the CUDA extension where nvcc is
	$(VENV) -m pip install --no-build-isolation --no-deps --editable .
	touch .venv/built

.venv/built: .venv/installed $(EXTENSION)
	$(MAKE) build

simt: .venv/built  ## build the simulator that runs the kernels on the CPU
	$(VENV) -m tests.simt

bench: .venv/built  ## measure real networks and layers against eager PyTorch and cuDNN, on a GPU or on the CPU
	$(VENV) -m bench

test: .venv/built simt  ## the whole test suite; what needs a GPU is skipped without one
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n $(WORKERS) --dist worksteal

kernel-report: .venv/built  ## registers, blocks, main loop, prologue and epilogue of every kernel in the built extension
	$(VENV) -m tests.kernel_report

coverage: .venv/built  ## what the simulator never reaches in the kernels and the plan, and why
	OMP_NUM_THREADS=1 $(VENV) -m tests.coverage_report

zoo: .venv/built  ## fuse every network of the zoo, compare it with the original, and write docs/zoo.md
	$(VENV) -m tests.zoo --workers $(WORKERS)

lint: .venv/built  ## ruff, clang-format and mypy; changes nothing
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	.venv/bin/clang-format --dry-run -Werror $(NATIVE)
	$(VENV) -m mypy

format: .venv/installed  ## format Python and C++ in place
	$(VENV) -m ruff check --fix .
	$(VENV) -m ruff format .
	.venv/bin/clang-format -i $(NATIVE)

clean:  ## remove what was built, .venv too
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	rm -f fused_cna/_C*.so fused_cna/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# For a machine with a GPU, a CUDA build of torch and no network: nothing is installed, and the extension is
# built for that GPU alone, inside the checkout, where it takes the place of the one that .venv uses.

gpu-build:
	mkdir -p $(OUT)
	rm -f .venv/built
	env -u TORCH_CUDA_ARCH_LIST FUSED_CNA_CUDA=1 $(PYTHON) setup.py build_ext --inplace > $(OUT)/build.log 2>&1 \
		|| { tail -n 50 $(OUT)/build.log; exit 1; }

gpu-test: gpu-build  ## the whole test suite on this machine's GPU, without .venv; the log goes to OUT
	workers=$$($(PYTHON) -c 'import importlib.util as u; print("-n 6 --dist worksteal --max-worker-restart=50" * bool(u.find_spec("xdist")))'); \
	OMP_NUM_THREADS=1 $(GPU_LIMIT) $(PYTHON) -m pytest $$workers 2>&1 | tee $(OUT)/test.log

gpu-sanitize: gpu-build  ## compute-sanitizer's four tools over every kernel; the report goes to OUT
	$(GPU_LIMIT) $(PYTHON) -m tests.gpu_sanitize 2>&1 | tee $(OUT)/sanitize.log

gpu-bench: gpu-build  ## the bench on this machine's GPU within BUDGET seconds; the results go to OUT
	$(GPU_LIMIT) $(PYTHON) -m bench --device cuda --budget $(BUDGET) --out $(OUT) 2>&1 | tee $(OUT)/bench.log
