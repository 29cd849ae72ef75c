# Everything runs in .venv, which the first target that needs it makes. PYTHON chooses its Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MAX_JOBS ?= $(shell nproc)
# How many tests CTest runs at once, and which: CTEST_ARGS="-R lengths".
MAX_TESTS = $(MAX_JOBS)
CTEST = ctest --output-on-failure --no-tests=error --parallel $(MAX_TESTS) $(CTEST_ARGS)
EMULATIONS = emulate-plain emulate-asan emulate-tsan
CLANG_FORMAT_FILES = $(shell find csrc tests/cpp tests/emulation tests/gpu -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: test integration bench bench-compare docs build lint format cpp-test sanitize emulate emulated-core \
        emulate-ops kernel-table wheel clean $(EMULATIONS) $(EMULATIONS:=-build)

test: build
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Models of other projects with our layers in them.
integration: build $(VENV)/.integration
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/integration

# The options of the benchmark go into BENCH_ARGS; `.venv/bin/python -m rnn_fused.bench --help`.
bench: build
	$(BIN)/python -m rnn_fused.bench $(BENCH_ARGS)

# The project's own benchmarks, this checkout beside another commit: make bench-compare BASE=HEAD~1
BASE ?= HEAD
bench-compare: build
	$(BIN)/python benchmarks/compare.py $(BASE) $(COMPARE_ARGS)

# The pages of docs/, into build/site.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Compiles what changed since the last build.
build: $(VENV)/.installed
	$(BIN)/python setup.py -q build_ext --inplace

# torch first and by its exact version: any range may download gigabytes of CUDA packages. The
# build's other requirements are those of pyproject.toml.
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "rnn_fused needs Python 3.10")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install "setuptools>=77" "ninja>=1.11" "pybind11>=2.13,<4"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --no-build-isolation --editable ".[test,bench,lint,examples,docs]"
	touch $@

$(VENV)/.integration: $(VENV)/.installed
	$(BIN)/python -m pip install --no-build-isolation --editable ".[integration]"
	touch $@

# pre-commit reads the files that git tracks.
lint: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pre-commit run --all-files --show-diff-on-failure

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CLANG_FORMAT_FILES)

# CORE_OBJECTS: the folder where `make build` has just compiled the core, so as not to do it again.
CONFIGURE_CORE = cmake -S . -B build/cmake -DRNN_FUSED_OBJECTS=$(abspath $(CORE_OBJECTS))
cpp-test:
	$(CONFIGURE_CORE)
	cmake --build build/cmake --parallel $(MAX_JOBS)
	$(CTEST) --test-dir build/cmake

# The C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer, on some instruction sets:
# see RNN_FUSED_LEFT_OUT in CMakeLists.txt.
sanitize:
	cmake -S . -B build/cmake-asan -DRNN_FUSED_SANITIZE=address,undefined
	cmake --build build/cmake-asan --parallel $(MAX_JOBS)
	$(CTEST) --test-dir build/cmake-asan

# The tests of the CUDA kernels on the CPU: plain, with AddressSanitizer, with ThreadSanitizer; and
# the operators' own tests on emulated kernels. Needs nvcc for its headers.
emulate: emulate-plain emulate-asan emulate-tsan emulate-ops

# What results are compared with: the core of the C++ tests, without sanitizers.
emulated-core:
	$(CONFIGURE_CORE)
	cmake --build build/cmake --target rnn_fused_core --parallel $(MAX_JOBS)

EMULATION = -DRNN_FUSED_TESTS=OFF -DRNN_FUSED_EMULATION=ON \
    -DRNN_FUSED_CORE=$(abspath build/cmake/librnn_fused_core.a) -DRNN_FUSED_SANITIZE=$(SANITIZE)
emulate-asan-build: SANITIZE = address,undefined
emulate-tsan-build: SANITIZE = thread
$(EMULATIONS:=-build): emulated-core
	cmake -S . -B build/$(@:-build=) $(EMULATION)
	cmake --build build/$(@:-build=) --target emulation --parallel $(MAX_JOBS)

# Its fibers take gigabytes.
emulate-tsan: MAX_TESTS = 1
$(EMULATIONS): %: %-build
	$(CTEST) --test-dir build/$@

# Of some files not what takes many calls: the kernels are those of the others.
EMULATED_OPS = build/emulate-plain/tests/emulation/libemulated_ops.so
emulate-ops: build emulated-core
	cmake -S . -B build/emulate-plain $(EMULATION) \
	    -DRNN_FUSED_TORCH=$$($(BIN)/python -c "import torch; print(torch.__path__[0])")
	cmake --build build/emulate-plain --target emulated_ops --parallel $(MAX_JOBS)
	$(BIN)/python -m pytest --emulated-cuda $(EMULATED_OPS) --numprocesses $(MAX_JOBS) --dist worksteal \
	    -k "not ((test_lengths or test_options or test_windows) and (gradcheck or any_ or skewed))" \
	    tests/test_emulated_families.py tests/test_ops.py tests/test_resets.py \
	    tests/test_lengths.py tests/test_options.py tests/test_windows.py tests/test_stacks.py \
	    $(PYTEST_ARGS)

# The check of the PTX wrappers; to be run on a GPU.
build/gpu_primitives: tests/gpu/primitives.cu $(wildcard csrc/cuda/*.*h tests/emulation/*.*h)
	mkdir -p build
	nvcc -std=c++20 -O3 -I. --Werror=all-warnings -Xcompiler=-Wall,-Wextra,-Werror \
	    -Xptxas=-warn-spills,-Werror -gencode=arch=compute_80,code=sm_80 \
	    -gencode=arch=compute_90a,code=sm_90a $< -o $@

# What each kernel takes of a GPU, and whether its machine code keeps the rules. Needs nvcc.
kernel-table: build
	$(BIN)/python tests/kernel_table.py rnn_fused/libops.so --out build/kernels.md

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info rnn_fused/*.so
