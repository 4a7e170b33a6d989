# SPDX-License-Identifier: MIT
# `make bench` and `make test` work on a fresh clone: they make .venv when there is none.
# `make PY=python3 …` uses an existing environment in place and downloads nothing.

TORCH   ?= 2.13.0
TRITON  ?= 3.7.1
ifdef PY
  PYTHON := $(PY)
  READY  :=
else
  PYTHON := .venv/bin/python
  READY  := .venv/.ready
endif

.DEFAULT_GOAL := help
.PHONY: help install bench test test-full check codegen codegen-full lint format wheel wheel-test cuda-build-test gpu clean

help:  ## print the targets
	@grep -hE '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

# torch first: with it installed, nothing below asks the registry for another one
.venv/.ready: pyproject.toml setup.py $(wildcard csrc/*)
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) setuptools==81.0.0 ninja
	.venv/bin/python -m pip install --quiet --disable-pip-version-check triton==$(TRITON)
	PATH="$(CURDIR)/.venv/bin:$$PATH" \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[dev]'
	@touch $@

install: $(READY)  ## make .venv: torch, triton, this package in place, the development tools

bench: $(READY)  ## the position bias and the attention with it against their peers and this machine's limits
	$(PYTHON) -m bench expand
	$(PYTHON) -m bench attention

PYTEST := $(PYTHON) -m pytest -q -n 2 --dist loadscope

test: $(READY)  ## every kind of test in minutes: kernels in Triton's interpreter, code generation offline
	$(PYTEST) -m "not slow"

test-full: $(READY)  ## the whole suite
	$(PYTEST)

check: lint test-full  ## lint, the whole suite, and the benches' smoke runs: the command before a push, and CI's
	$(PYTHON) -m bench expand --smoke
	$(PYTHON) -m bench attention --smoke

codegen: $(READY)  ## compile the kernels for sm_80, sm_90, sm_100, gfx942; table of registers and accesses
	$(PYTHON) -m bench codegen
	$(PYTHON) -m bench codegen --csrc

TRITONS ?= 3.6.0 3.7.1 3.8.0

codegen-full: $(READY)  ## the attention kernels with every option set, under each Triton
	for version in $(TRITONS); do \
	  test -d build/triton-$$version || $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps \
	    --target build/triton-$$version triton==$$version || exit 1; \
	  PYTHONPATH=build/triton-$$version $(PYTHON) -m bench codegen --full --kernel attention \
	    --kernel "attention backward" || exit 1; \
	done

wheel: $(READY)  ## the sdist and the wheel, in dist/: one binary for Python >= 3.10 and torch >= 2.10
	PATH="$(dir $(abspath $(PYTHON))):$$PATH" DPB_TRITON_CSRC=1 $(PYTHON) -m build --no-isolation

wheel-test: wheel  ## that wheel in a fresh environment without a compiler
	rm -rf build/wheel-test
	python3 -m venv build/wheel-test
	build/wheel-test/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	build/wheel-test/bin/python -m pip install --quiet --disable-pip-version-check $$(ls -t dist/*.whl | head -1)
	cp tests/smoke.py build/wheel-test/
	cd build/wheel-test && PATH=/nowhere bin/python smoke.py

# Where a CUDA build of torch is: an environment of its own, made once, or `CUDA_PY=/path/to/python` in place
TORCH_CUDA ?= 2.14.1
ifdef CUDA_PY
  CUDA_PYTHON := $(if $(findstring /,$(CUDA_PY)),$(abspath $(CUDA_PY)),$(CUDA_PY))
  CUDA_READY  :=
else
  CUDA_PYTHON := $(CURDIR)/build/cuda/bin/python
  CUDA_READY  := build/cuda/.ready-$(TORCH_CUDA)
endif
CUDA_TEST := $(CURDIR)/build/cuda-test

build/cuda/.ready-$(TORCH_CUDA):
	python3 -m venv build/cuda
	$(CUDA_PYTHON) -m pip install --quiet --disable-pip-version-check torch==$(TORCH_CUDA) setuptools==81.0.0 ninja
	$(CUDA_PYTHON) -m pip install --quiet --disable-pip-version-check einops hypothesis numpy pytest pytest-xdist
	@touch $@

# sdist -> wheel -> a folder that looks like a checkout whose dpb_triton is the wheel's; tests "on the host" know no torch
cuda-build-test: $(CUDA_READY)  ## the wheel against a CUDA build of torch (5 GB in build/cuda), built and tested without a GPU
	rm -rf $(CUDA_TEST)
	$(CUDA_PYTHON) setup.py --quiet sdist --dist-dir $(CUDA_TEST)/dist
	DPB_TRITON_CSRC=1 $(CUDA_PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
		--wheel-dir $(CUDA_TEST)/dist $(CUDA_TEST)/dist/*.tar.gz
	$(CUDA_PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --target $(CUDA_TEST) $(CUDA_TEST)/dist/*.whl
	cp -r bench csrc tests LICENSE README.md pyproject.toml setup.py $(CUDA_TEST)
	mkdir $(CUDA_TEST)/empty
	cd $(CUDA_TEST)/empty && PYTHONPATH=$(CUDA_TEST) $(CUDA_PYTHON) ../tests/smoke_cuda.py
	cd $(CUDA_TEST) && $(CUDA_PYTHON) -m pytest -q -n 2 --dist loadfile -k "not on_the_host" \
		tests/expand/test_expand.py tests/expand/test_properties.py tests/expand/test_reduce.py \
		tests/module/test_module.py tests/multihead tests/csrc

CSRC := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu tests/csrc/*.cpp)

lint: $(READY)  ## ruff, clang-format and mypy, as pinned
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(dir $(PYTHON))clang-format --dry-run --Werror $(CSRC)

format: $(READY)  ## let them rewrite
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(dir $(PYTHON))clang-format -i $(CSRC)

gpu:  ## all that needs a GPU, on this machine's, with the torch installed there: nothing is downloaded
	$(or $(PY),python3) -m bench gpu

# the lent machine's; pyenv puts a name on PATH that may start nothing
GPU_PYTHON ?= $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12)),python3.12)
GPU_TRITON ?= 3.6.0
# Triton alone, twice: for the lent machine's Python, which compiles, and for ours, which finds out what is launched.
build/gpu-cache/.ready: Makefile
	$(GPU_PYTHON) -m venv build/gpu-cache/python
	build/gpu-cache/python/bin/python -m pip install --quiet --disable-pip-version-check numpy triton==$(GPU_TRITON)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target build/gpu-cache/triton \
	    triton==$(GPU_TRITON)
	@touch $@

.PHONY: gpu-cache
gpu-cache: $(READY) build/gpu-cache/.ready  ## compile `make gpu`'s kernels for a lent H100 into build/gpu-cache.tar
	PYTHONPATH=$(CURDIR)/build/gpu-cache/triton $(PYTHON) -m bench gpu \
	    --fill-cache build/gpu-cache.tar --python build/gpu-cache/python/bin/python

clean:  ## remove .venv and caches
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
