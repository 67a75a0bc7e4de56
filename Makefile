# Everything runs in .venv, which each target makes for itself from the pinned versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What a GPU needs besides; with BIN=DIRECTORY on the command line that one's python is taken, as it is.
GPU := $(if $(filter file,$(origin BIN)),$(VENV)/.gpu)
# Half of a test is a single thread, so two run at once; the tests of a file stay together, and share what they build.
TWO := -n 2 --dist loadfile
BENCH ?= synthetic:sd-turbo
PRECISION ?= fp32
BENCH_GPU ?=

.PHONY: setup demo test check check-full check-gpu bench bench-gpu inspect-engines clean

setup: $(VENV)/.installed

# torch first and by its exact version: a range may bring a build with gigabytes of CUDA libraries.
# open_clip_torch only for the CLIP vocabulary that it carries, so without its dependencies.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) install -q -c constraints.txt -e '.[cpu,export,tensorrt-rtx,dev]'
	$(PIP) install -q -c constraints.txt --no-deps open_clip_torch
	touch $@

$(VENV)/.gpu: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[tensorrt]'
	touch $@

demo: setup
	$(BIN)/build-engine synthetic:sd-turbo-mini -o demo.bundle
	$(BIN)/turbochain verify demo.bundle
	$(BIN)/turbochain generate demo.bundle "a photo of a cat" --seed 0 -o demo.png
	$(BIN)/turbochain bench demo.bundle

test: setup
	$(BIN)/python -m pytest -q $(TWO)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-full: check
	$(BIN)/python -m pytest -q $(TWO) -m 'not gpu and not full'
	$(BIN)/python -m pytest -q -m full

check-gpu: $(GPU)
	$(BIN)/python -m pytest -q -m gpu

bench: setup
	$(BIN)/python benchmarks/measure.py $(BENCH) --precision $(PRECISION)

bench-gpu: $(GPU)
	$(BIN)/python benchmarks/gpu.py $(BENCH_GPU)

inspect-engines: $(if $(filter file,$(origin BIN)),setup)
	$(BIN)/python benchmarks/inspect_engines.py $(BUNDLE)

clean:
	rm -rf $(VENV) demo.bundle demo.bundle.partial demo.png build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
