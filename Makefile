# Everything runs in .venv, which each target makes for itself from the pinned versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := cpu,openvino,export,tensorrt-rtx,serve,mcp,dev
# A GPU's libraries exclude some of the CPU's, so it has an environment of its own; with BIN=DIRECTORY on the command
# line that one's python is taken, as it is.
GPU_EXTRAS := cuda,export,tensorrt,serve,dev
GPU_VENV := $(if $(filter file,$(origin BIN)),.venv-gpu)
GPU_BIN := $(if $(GPU_VENV),$(GPU_VENV)/bin,$(BIN))
# Ray is larger than all the others but torch, and only its own tests need it. tests/bundles.py needs cuda-bindings.
RAY_EXTRAS := cpu,export,serve,ray,dev
# Half of a test is a single thread, so two run at once; the tests of a file stay together, and share what they build.
# Files in the order of tests/conftest.py, the longest first: by the number of tests, few long ones would come last.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
# The shared bundles of the tests stay here until the code changes; nothing, as in .ci/run: they are built each time.
BUNDLES ?= .test-bundles
BENCH ?= synthetic:sd-turbo
PRECISION ?= fp32
PEERS := optimum-onnx optimum-intel stable-diffusion-cpp
BENCH_GPU ?= synthetic:sd-turbo synthetic:sdxl-turbo
TINY := --vae tiny --steps 1 --batch 1 --cold --pairs tensorrt-fp16:eager-fp16-tuned tensorrt-fp16:compiled-fp16
COMBINATIONS ?= 0:40
PROMPT ?= a large red circle left of a small blue square on a yellow background
# The demo's ControlNet was trained for one step from noise alone, so that is what it is built and verified for.
CONTROL := --tasks text-to-image --steps 1 --controlnet canny=export/demo/controlnet

.PHONY: setup demo test check check-full campaign check-gpu check-ray check-web bench bench-smoke bench-setup bench-variants bench-build bench-serve bench-adapters bench-gpu inspect-engines train-demo clean

setup: $(VENV)/.installed

# torch first and by its exact version: a range may bring a build with gigabytes of CUDA libraries.
define INSTALL
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(@D)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt -e '.[$(1)]' $(2)
	touch $@
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call INSTALL,$(value EXTRAS))

.venv-gpu/.installed: pyproject.toml constraints.txt
	$(call INSTALL,$(value GPU_EXTRAS))

.venv-ray/.installed: pyproject.toml constraints.txt
	$(call INSTALL,$(value RAY_EXTRAS),cuda-bindings)

# What the tests of runtime/web need, which are skipped without it. The packages' scripts would download CUDA.
.node/.installed: runtime/web/package.json runtime/web/package-lock.json
	mkdir -p $(@D)
	cp $^ $(@D)
	if command -v npm > /dev/null; then \
	  cd $(@D) && ONNXRUNTIME_NODE_INSTALL=skip npm ci --ignore-scripts --no-audit --no-fund && touch .installed || \
	  echo "npm cannot fetch the packages of runtime/web: its tests are skipped"; \
	fi

demo: setup
	$(BIN)/build-engine demo -o demo.bundle --precision fp32
	$(BIN)/build-engine demo -o demo-control.bundle --precision fp32 $(CONTROL)
	$(BIN)/turbochain verify demo.bundle
	$(BIN)/turbochain generate demo.bundle "$(PROMPT)" --seed 0 -o picture.png
	$(BIN)/turbochain bench demo.bundle
	$(BIN)/python tests/demo_model/contact_sheet.py demo.bundle demo-control.bundle -o demo.png

test: setup .node/.installed
	$(BIN)/python -m pytest -q $(TWO) $(BUNDLES:%=--bundles=%)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types/turbochain
	ln -sfn $(addprefix $(CURDIR)/,export engines runtime) build/types/turbochain
	$(BIN)/mypy

check-full: check .node/.installed
	$(BIN)/python -m pytest -q $(TWO) -m 'not gpu and not full and not web and not ray'
	$(BIN)/python -m pytest -q -m full

# Random combinations of models, parts, tasks, schedulers and calls against diffusers; these are the seeds.
campaign: setup
	$(BIN)/python -m pytest -q -m full tests/test_combinations.py --combinations $(COMBINATIONS) $(BUNDLES:%=--bundles=%)

check-web: setup .node/.installed
	$(BIN)/python -m pytest -q -m web

check-gpu: $(addsuffix /.installed,$(GPU_VENV))
	$(GPU_BIN)/python -m pytest -q -m gpu

check-ray: .venv-ray/.installed
	.venv-ray/bin/python -m pytest -q -m ray tests/serve/test_ray.py tests/serve/test_deploy.py $(BUNDLES:%=--bundles=%)

bench: setup
	$(BIN)/python benchmarks/bench.py $(BENCH)

bench-smoke: setup
	$(BIN)/python -m pytest -q tests/benchmarks/test_bench.py

bench-setup: $(PEERS:%=.bench/%/.installed)

# Each peer wants other versions of what the others want, so it has an environment of its own. Its file lists all that
# is needed: with dependencies would come torchvision with gigabytes of CUDA, and a package that reports over the network.
.bench/%/.installed: benchmarks/peers/%.txt
	$(PYTHON) -m venv $(@D)
	if grep -q ^diffusers $<; then \
	  $(@D)/bin/python -m pip --disable-pip-version-check install -q torch==$$(sed -n 's/^torch==//p' constraints.txt); fi
	$(@D)/bin/python -m pip --disable-pip-version-check install -q --no-deps -r $<
	touch $@

bench-variants: setup
	$(BIN)/python benchmarks/variants.py $(BUNDLE)

bench-build: setup
	$(BIN)/python benchmarks/build_cost.py $(BENCH) --precision $(PRECISION)

bench-serve: setup
	$(BIN)/python benchmarks/serve_cost.py $(BUNDLE)

bench-adapters: setup
	$(BIN)/python benchmarks/adapter_cost.py $(BUNDLE)

bench-gpu: $(addsuffix /.installed,$(GPU_VENV))
	$(GPU_BIN)/python benchmarks/bench.py --device cuda $(BENCH_GPU)
	$(if $(filter file,$(origin BENCH_GPU)),$(GPU_BIN)/python benchmarks/bench.py --device cuda $(BENCH_GPU) $(TINY))

inspect-engines: $(if $(filter file,$(origin BIN)),setup)
	$(BIN)/python benchmarks/inspect_engines.py $(BUNDLE) $(RESULTS:%=--results %)

# Hours on a CPU, minutes on a GPU; stopped, the same command goes on. README's picture and figures are then old:
# contact_sheet.py draws the one, benchmarks/report.py writes the others.
train-demo: setup
	$(BIN)/python tests/demo_model/train.py
	$(BIN)/python tests/demo_model/checkpoint.py
	$(BIN)/python tests/demo_model/control.py
	$(BIN)/python tests/demo_model/grade.py
	$(BIN)/python tests/demo_model/grade_control.py

clean:
	rm -rf $(VENV) .venv-gpu .venv-ray .node demo*.bundle demo*.bundle.partial demo.png picture.png build dist *.egg-info .test-bundles .pytest_cache .mypy_cache .ruff_cache
