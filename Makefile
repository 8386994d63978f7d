SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Python that makes .venv, and that runs the gpu- targets with the torch it has.
PYTHON ?= python3
# Test processes at a time.
WORKERS ?= 2
# Seconds that gpu-bench may take, the folder that the gpu- targets write to, and what gpu-first left behind.
BUDGET ?= 300
OUT ?= build/gpu
BEFORE ?= $(OUT)/first.json

VENV := .venv/bin/python
# The GPUs that this machine shows, if any.
GPU := $(shell nvidia-smi -L 2>/dev/null)
NATIVE := $(shell find csrc tests/simt tests/gpu -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
EXTENSION := setup.py cuda_build.py pyproject.toml $(filter csrc/%,$(NATIVE))

GPU_TARGETS := gpu-first gpu-second gpu-third gpu-build gpu-test gpu-sanitize gpu-profile gpu-bench

.PHONY: help venv build bench test test-quick zoo lint format simt kernel-report coverage clean $(GPU_TARGETS)

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' Makefile | expand -t 16

venv: .venv/tools  ## .venv with everything in requirements/

# What building and measuring need; the tests need as much again.
.venv/installed: requirements/build.txt requirements/bench.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install $(foreach file,$^,-r $(file))
	touch $@

.venv/tools: .venv/installed requirements/test.txt requirements/lint.txt
	$(VENV) -m pip install -r requirements/test.txt -r requirements/lint.txt
	touch $@

build: .venv/installed  ## install fused_cna into .venv, editable, with the CUDA extension where nvcc is
	$(VENV) -m pip install --no-build-isolation --no-deps --editable .
	touch .venv/built

.venv/built: .venv/installed $(EXTENSION)
	$(MAKE) build

# The planner alone, in seconds. Once the extension is built it has the planner too.
.venv/planner: .venv/installed $(EXTENSION)
	@echo "No GPU is visible: the CUDA kernels are not compiled. 'make build' compiles them."
	FUSED_CNA_CUDA=0 $(VENV) -m pip install --no-build-isolation --no-deps --editable .
	touch $@

simt: .venv/tools .venv/built  ## build the simulator that runs the kernels on the CPU
	$(VENV) -m tests.simt

bench: .venv/$(if $(GPU)$(wildcard .venv/built),built,planner)  ## measure networks and layers against eager PyTorch (and cuDNN, on a GPU)
	$(VENV) -m bench

# Without a GPU one architecture does, whose machine code the tests read. TORCH_CUDA_ARCH_LIST="8.0;9.0" reads both.
test test-quick: export TORCH_CUDA_ARCH_LIST := $(or $(TORCH_CUDA_ARCH_LIST),$(if $(GPU),,9.0))

test: simt  ## the whole test suite; what needs a GPU is skipped without one
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n $(WORKERS) --dist worksteal

test-quick: simt  ## every fourth case of each test, and none that is slow: for daily work
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n $(WORKERS) --dist worksteal --quick

kernel-report: .venv/tools .venv/built  ## registers, blocks, main loop, prologue and epilogue of every kernel in the built extension
	$(VENV) -m tests.kernel_report

coverage: .venv/tools .venv/built  ## what the simulator never reaches in the kernels and the plan, and why
	OMP_NUM_THREADS=1 $(VENV) -m tests.coverage_report

zoo: .venv/tools .venv/built  ## fuse every network of the zoo, compare it with the original, and write docs/zoo.md
	$(VENV) -m tests.zoo --workers $(WORKERS)

lint: .venv/tools .venv/built  ## ruff, clang-format and mypy; changes nothing
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	.venv/bin/clang-format --dry-run -Werror $(NATIVE)
	$(VENV) -m mypy

format: .venv/tools  ## format Python and C++ in place
	$(VENV) -m ruff check --fix .
	$(VENV) -m ruff format .
	.venv/bin/clang-format -i $(NATIVE)

clean:  ## remove what was built, .venv too
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	rm -f fused_cna/_C*.so fused_cna/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# For a machine with a GPU, a CUDA build of torch and no network, where minutes count: nothing is installed, and an
# extension that is built is built for that GPU alone, inside the checkout, where it takes the place of the one that
# .venv uses. Each ends in time by itself, leaves a JSON and a log in OUT, and prints what matters last.

gpu-first:  ## first contact in 330 s: does it run, is it right, how fast is one network; needs no build
	$(PYTHON) -m tests.gpu first $(OUT)

gpu-second:  ## then in 480 s: what failed in BEFORE, more networks, layers against every route of cuDNN
	$(PYTHON) -m tests.gpu second $(OUT) --before $(BEFORE)

gpu-third:  ## where 300 s are left: races in every kernel, layers at batch 1 and 128 and in other dtypes
	$(PYTHON) -m tests.gpu third $(OUT)

gpu-build:  ## the extension, for this machine's GPU
	$(PYTHON) -m tests.gpu build $(OUT)

gpu-test:  ## the tests that need a GPU
	$(PYTHON) -m tests.gpu test $(OUT)

gpu-sanitize:  ## compute-sanitizer's four tools over every kernel
	$(PYTHON) -m tests.gpu sanitize $(OUT)

gpu-profile:  ## what bounds thirteen telling layers, by Nsight Compute
	$(PYTHON) -m tests.gpu profile $(OUT)

gpu-bench:  ## the bench on this machine's GPU within BUDGET seconds
	$(PYTHON) -m tests.gpu bench $(OUT) --seconds $(BUDGET)
