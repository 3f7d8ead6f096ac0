# Everything runs from .venv, which the first target that needs it makes: nothing has to be activated.
# Another interpreter: make test PYTHON=/path/to/python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := CMakeLists.txt $(wildcard src/lean3d/ops/*/*.cpp src/lean3d/ops/*/*.h)
# The others compare with checkouts of other projects, whose places they want to know.
BENCHMARKS := $(filter-out benchmarks/parity_% %_foreign.py,$(wildcard benchmarks/[a-z]*.py))

NATIVE_TESTS := $(addprefix tests/test_,$(addsuffix .py,native pool norm fast_conv fused_conv ops))

.DEFAULT_GOAL := help
.PHONY: help setup native sanitize demo test test-all check bench hooks clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv and install lean3d with its tools into it

# The marker is touched last, so that an installation that was cut off starts again.
$(READY): pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "lean3d needs Python 3.11 or newer, and $(PYTHON) is: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "Install a newer one and name it: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); \
	  echo "$(PYTHON) can't make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing lean3d and its tools into $(VENV): some minutes, once."
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[dev]"
	@touch $(READY)

native: $(READY) ## build the native kernels again, after a change in them
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -e .

# Python itself is not built with the sanitizers, so their runtimes come first by LD_PRELOAD, and leaks are not looked for.
SANITIZED := build/sanitize
sanitize: $(READY) ## build the native kernels with address and undefined-behaviour sanitizers, and run their tests
	@command -v cmake ninja >/dev/null || $(BIN)/python -m pip install --disable-pip-version-check --quiet cmake ninja
	@$(BIN)/python -c 'import nanobind' 2>/dev/null || $(BIN)/python -m pip install --disable-pip-version-check --quiet nanobind
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(SANITIZED) -G Ninja -DLEAN3D_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python >/dev/null
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build $(SANITIZED)
	LEAN3D_NATIVE="$$(ls $(abspath $(SANITIZED))/_native.*so)" \
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 OMP_NUM_THREADS=2 \
	$(BIN)/python -m pytest -q --timeout 1800 $(NATIVE_TESTS)

demo: $(READY) ## make small videos, train a light net on them, test it, write a report (minutes)
	$(BIN)/lean3d demo --out demo

# Two processes of one thread each: as fast as two cores are, and what a test does with threads it says itself.
QUICK_TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(READY) ## run the tests, without those that take minutes
	$(QUICK_TESTS)

test-all: $(READY) ## run all tests
	$(BIN)/python -m pytest -m "slow or not slow"

check: $(READY) ## lint, format, types, import layers, tests: what has to be green before a commit
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(QUICK_TESTS)

bench: $(READY) ## run the benchmarks; what they find goes to benchmarks/results/
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

hooks: $(READY) ## have git run the quick part of `check` before each commit
	$(BIN)/pre-commit install

clean: ## remove .venv, caches and the demo's files
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
