# SPDX-License-Identifier: MIT
# `make bench` and `make test` work on a fresh clone: they make .venv if it is missing.
# `make PY=python3 …` uses an existing environment in place and downloads nothing.

TORCH   ?= 2.13.0
TRITON  ?= 3.7.1
ifdef PY
  PYTHON      := $(PY)
  READY       :=
  READY_BENCH :=
else
  PYTHON      := .venv/bin/python
  READY       := .venv/.ready
  READY_BENCH := .venv/.ready-bench
endif
# Containers often set it. Then each process that a test starts compiles torch's Python anew.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: bench bench-full test test-full check matrix install lint format codegen codegen-full wheel wheel-test \
  cuda-build-test gpu gpu-cache clean help

bench: $(READY_BENCH)  ## compare speeds in two minutes: both benches, then a summary in words
	$(PYTHON) -m bench quick

bench-full: $(READY_BENCH)  ## compare with FlexAttention and compiled eager too, in two dtypes
	$(PYTHON) -m bench expand
	$(PYTHON) -m bench attention

# torch first: the later commands then keep it. --no-compile: Python compiles what it imports, a small part of torch.
# Without build isolation pip needs no second setuptools. There is no Triton: a CUDA build of torch brings its own,
# and the bench never times Triton on a CPU.
.venv/.ready-bench: pyproject.toml setup.py $(wildcard csrc/*)
	python3 -m venv .venv
	.venv/bin/python $(INSTALL) --no-compile torch==$(TORCH) setuptools==81.0.0 ninja
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python $(INSTALL) --no-compile --no-build-isolation -e '.[bench]'
	@touch $@

# The package is installed by now. Asked for it by name, pip adds only what `dev` needs, and does not build again.
.venv/.ready: .venv/.ready-bench
	.venv/bin/python $(INSTALL) --no-compile triton==$(TRITON) 'dpb_triton[dev]'
	@touch $@

PYTEST := $(PYTHON) -m pytest -q -n 2 --dist loadscope

test: $(READY)  ## run a test of every kind in eight minutes, without a GPU
	$(PYTEST) -m "not slow"

test-full: $(READY)  ## run the whole suite
	$(PYTEST)

check: lint test-full  ## lint, run the whole suite and tiny benches: before a push, and in CI
	$(PYTHON) -m bench expand --smoke
	$(PYTHON) -m bench attention --smoke
	$(PYTHON) -m bench decode --smoke

# ROWS="oldest newest" runs these; .ci/matrix.py lists them. Each pair of a Python and a torch takes 3 GB of disk.
matrix: $(READY)  ## run the quick suite on other versions of Python, torch, Triton and peers
	$(PYTHON) .ci/matrix.py $(ROWS)

install: $(READY)  ## make .venv: torch, Triton, this package in place, the development tools

codegen: $(READY)  ## compile the kernels for four kinds of GPU; count registers and accesses
	$(PYTHON) -m bench codegen
	$(PYTHON) -m bench codegen --csrc

TRITONS ?= 3.6.0 3.7.1 3.8.0

codegen-full: $(READY)  ## compile the attention kernels with every option, under each Triton
	for version in $(TRITONS); do \
	  test -d build/triton-$$version || \
	    $(PYTHON) $(INSTALL) --no-deps --target build/triton-$$version triton==$$version || exit 1; \
	  PYTHONPATH=build/triton-$$version $(PYTHON) -m bench codegen --full --kernel attention \
	    --kernel "attention backward" || exit 1; \
	done

wheel: $(READY)  ## build the sdist and one wheel for Python >= 3.10 and torch >= 2.10, in dist/
	PATH="$(dir $(abspath $(PYTHON))):$$PATH" DPB_TRITON_CSRC=1 $(PYTHON) -m build --no-isolation

wheel-test: wheel  ## try that wheel in a fresh environment without a compiler
	rm -rf build/wheel-test
	python3 -m venv build/wheel-test
	build/wheel-test/bin/python $(INSTALL) torch==$(TORCH)
	build/wheel-test/bin/python $(INSTALL) $$(ls -t dist/*.whl | head -1)
	cp tests/smoke.py build/wheel-test/
	cd build/wheel-test && PATH=/nowhere bin/python smoke.py

# The CUDA build of torch has its own environment, made once. `CUDA_PY=/path/to/python` uses another one in place.
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
	$(CUDA_PYTHON) $(INSTALL) torch==$(TORCH_CUDA) setuptools==81.0.0 ninja
	$(CUDA_PYTHON) $(INSTALL) einops hypothesis numpy pytest pytest-xdist
	@touch $@

# sdist -> wheel -> a folder like a checkout, with the wheel's dpb_triton. Tests "on the host", between guard pages, and
# slow ones need no CUDA build of torch: the suite has run them.
cuda-build-test: $(CUDA_READY)  ## build and test the wheel with a CUDA build of torch (5 GB), without a GPU
	rm -rf $(CUDA_TEST)
	$(CUDA_PYTHON) setup.py --quiet sdist --dist-dir $(CUDA_TEST)/dist
	DPB_TRITON_CSRC=1 $(CUDA_PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
		--wheel-dir $(CUDA_TEST)/dist $(CUDA_TEST)/dist/*.tar.gz
	$(CUDA_PYTHON) $(INSTALL) --no-deps --target $(CUDA_TEST) $(CUDA_TEST)/dist/*.whl
	cp -r bench csrc tests LICENSE README.md pyproject.toml setup.py $(CUDA_TEST)
	mkdir $(CUDA_TEST)/empty
	cd $(CUDA_TEST)/empty && PYTHONPATH=$(CUDA_TEST) $(CUDA_PYTHON) ../tests/smoke_cuda.py
	cd $(CUDA_TEST) && $(CUDA_PYTHON) -m pytest -q -n 2 --dist loadfile -m "not slow" \
		-k "not on_the_host and not guard_pages and not triton" \
		tests/expand/test_expand.py tests/expand/test_reduce.py tests/module/test_module.py tests/csrc

# looked up when a recipe runs, after the set-up
CLANG_FORMAT = $(firstword $(wildcard $(dir $(PYTHON))clang-format) clang-format)
CSRC := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu tests/csrc/*.cpp tests/csrc/*.c tests/csrc/*/*.h)

lint: $(READY)  ## ruff, clang-format and mypy, as pinned
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $(CSRC)

format: $(READY)  ## let ruff and clang-format rewrite the files
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(CSRC)

gpu:  ## run all that needs a GPU, with the torch that is installed here
	$(or $(PY),python3) -m bench gpu

# The lent machine's Python. A name that pyenv puts on PATH may start nothing.
GPU_PYTHON ?= $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12)),python3.12)
GPU_TRITON ?= 3.6.0
# Triton alone, twice: the lent machine's Python compiles with one, ours records the launches with the other.
build/gpu-cache/.ready: Makefile
	$(GPU_PYTHON) -m venv build/gpu-cache/python
	build/gpu-cache/python/bin/python $(INSTALL) numpy triton==$(GPU_TRITON)
	$(PYTHON) $(INSTALL) --upgrade --no-deps --target build/gpu-cache/triton triton==$(GPU_TRITON)
	@touch $@

gpu-cache: $(READY) build/gpu-cache/.ready  ## compile the kernels of `make gpu` for an H100 into build/gpu-cache.tar
	PYTHONPATH=$(CURDIR)/build/gpu-cache/triton $(PYTHON) -m bench gpu \
	    --fill-cache build/gpu-cache.tar --python build/gpu-cache/python/bin/python

clean:  ## remove .venv and caches
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

help:  ## print the targets
	@grep -hE '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'
