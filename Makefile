# The jobs of this repository, each one command. They run in .venv, which is set up on first use; with PYTHON they run
# in an environment of yours, which is left as it is:
#   make gpu-check PYTHON=python OUT=/tmp/results
# gpu-check is gpu-test, gpu-sanitize, gpu-tune and gpu-bench; each command is bounded by LIMIT and can be run by itself.

ifeq ($(origin PYTHON), undefined)
PYTHON := .venv/bin/python
READY := .venv/.installed
endif
SANITIZER ?= compute-sanitizer
LIMIT ?= 580s
# The folder of the JSON files: bench/results/h200 on an NVIDIA H200.
OUT ?= bench/results/$(shell $(PYTHON) -m linlora.bench.folder)
# pytest-xdist workers on the GPU; they share its memory.
WORKERS ?= 12
# Of what is random in test-everywhere, and the tests that it runs.
SEEDS ?= 0 1
TESTS ?= tests

.PHONY: install aot cuda wheels compile-matrix test test-everywhere peft-suite lint types docs quickstart bench gpu-check gpu-test gpu-sanitize gpu-memcheck gpu-racecheck gpu-bench \
  gpu-bench-compiled gpu-tune require-gpu

install: $(READY)

.venv/.installed: pyproject.toml setup.py constraints.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install -e '.[test]' -c constraints.txt
	.venv/bin/python csrc/build.py || true  # the CUDA kernels, where there is nvcc; it says why not
	touch $@

# The CUDA kernels, in place: needs nvcc. LINLORA_CUDA_ARCHITECTURES=90a compiles for Hopper alone.
cuda: $(READY)
	$(PYTHON) csrc/build.py

# dist/: linlora, for every platform, and linlora-cuda, one library for every Python and torch. nvcc of CUDA 12.8 makes
# one for drivers from R525 on and every GPU; that of 13 needs R580. CUDA_HOME says which.
wheels: $(READY)
	$(PYTHON) -m pip wheel -q --no-deps --no-build-isolation -w dist . ./csrc

# Every Triton kernel in every variant, for every architecture: about ten minutes from a cold cache.
aot: $(READY)
	$(PYTHON) -m linlora.kernels.aot --jobs 2

# csrc/ by compilers of other CUDA versions, from PyPI: minutes for each.
compile-matrix: $(READY)
	$(PYTHON) tests/csrc/compile_matrix.py 12.6 12.8 13.0 13.2

# What .ci/run runs: style, types, documentation, doctests and tests (on the GPU where there is one).
test: lint docs
	$(PYTHON) -m pytest -q -n auto --dist worksteal

# The tests by every instruction set that torch has on this machine, with every seed of SEEDS: a line of result for each.
test-everywhere: $(READY)
	$(PYTHON) tests/everywhere.py --seeds $(SEEDS) -- $(TESTS)

# PEFT's own tests of LoRA models, stock and accelerated: make peft-suite PEFT=<source tree of the installed version>.
peft-suite: $(READY)
	$(PYTHON) tests/peft_suite/peft_suite.py $(PEFT)

lint: $(READY) types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# mypy of linlora with kernels/ where it is installed: linlora.kernels.
types: $(READY)
	rm -rf build/typed && mkdir -p build/typed/linlora
	ln -s $(CURDIR)/linlora/* $(CURDIR)/kernels build/typed/linlora/
	cd build/typed && $(or $(wildcard $(CURDIR)/$(PYTHON)),$(PYTHON)) -m mypy --config-file $(CURDIR)/pyproject.toml -p linlora

# The documentation as a site, in build/site; a broken link or name is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

quickstart: $(READY)
	$(PYTHON) -m linlora.cli quickstart

bench: $(READY)
	$(PYTHON) -m linlora.bench

# Runs what is there: `make cuda` first, for the kernels of csrc/. What fails does not keep the rest from running.
gpu-check:
	$(MAKE) -k gpu-test gpu-sanitize gpu-tune gpu-bench

# The whole test suite: the tests run on the GPU, with real dtypes, where there is one.
gpu-test: require-gpu
	timeout $(LIMIT) $(PYTHON) -m pytest -q -n $(WORKERS) --continue-on-collection-errors

# Every kernel at small shapes and the flag protocol at a large one; the caching allocator would hide overruns.
gpu-sanitize: gpu-memcheck gpu-racecheck

gpu-memcheck gpu-racecheck: gpu-%: require-gpu
	@command -v $(SANITIZER) > /dev/null || { \
	  echo "$(SANITIZER) is not on the PATH: it comes with the CUDA toolkit, or with"; \
	  echo "'pip install nvidia-cuda-sanitizer-api'; name it with SANITIZER=..."; exit 1; }
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout $(LIMIT) \
	  $(SANITIZER) --tool $* --error-exitcode 9 $(PYTHON) -m linlora.bench.sanitize

# One JSON a run under $(OUT); the exit status is 1 when a correctness check is red.
gpu-bench: require-gpu
	timeout $(LIMIT) $(PYTHON) -m linlora.bench --suite gpu --device cuda --seconds 480 --out $(OUT)

# Not part of gpu-check: torch.compile takes most of the time.
gpu-bench-compiled: require-gpu
	timeout $(LIMIT) $(PYTHON) -m linlora.bench --suite compiled --compiled --device cuda --seconds 480 --out $(OUT)

# Proves the kernels: evidence for this machine, and under $(OUT) for the package; the same command continues.
gpu-tune: require-gpu
	timeout $(LIMIT) $(PYTHON) -m linlora.cli tune --seconds 480 --export $(OUT)/tune.json

require-gpu: $(READY)
	@$(PYTHON) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'no CUDA GPU is available to torch')"
