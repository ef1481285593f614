# A user needs `make demo` and `make test`. Both set up the environment on the first run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RIVALS := build/rivals
INTEROP := build/interop

.PHONY: demo test models test-real test-slow test-random test-devices sshd check interop aarch64 rivals-env clean
.DEFAULT_GOAL := help

help:
	@echo "make demo          compress, export and measure Whisper tiny.en; ends in a table"
	@echo "make test          run the tests"
	@echo "make check         check format, lint, types and import contracts"
	@echo "make test-slow     run the tests that take minutes"
	@echo "make test-random   run the tests of make test with new random inputs"
	@echo "make test-devices  run the tests that need an emulated device"
	@echo "make test-real     run the tests on OpenAI's models, and on the rivals after make rivals-env"
	@echo "make models        download OpenAI's tiny.en and base to build/models"
	@echo "make rivals-env    install faster-whisper, whisper.cpp and sherpa-onnx for bench --rival"
	@echo "make interop       run the layouts in optimum, transformers.js and sherpa-onnx"
	@echo "make aarch64       count instructions on emulated ARM cores, compare with the stored counts"
	@echo "make clean         remove the environments and edgewhisper-runs"

demo: $(READY)
	$(BIN)/edgewhisper demo

# one thread a worker: two workers use both cores; loadscope: one worker runs a whole module, so that
# the fixtures of the module are built once
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope

test: $(READY) sshd
	@sh tests/helpers/system-packages.sh 'espeak-ng --version' espeak-ng
	@sh tests/helpers/system-packages.sh 'flite -lv' flite
	$(PYTEST)

test-random:
	EDGEWHISPER_SEED=random $(MAKE) test

models: $(READY)
	$(BIN)/python -m edgewhisper.checkpoints.fetch tiny.en base --out build/models

# the two longest modules start first, one in each process
LONG := tests/real/test_real_rivals.py tests/real/test_real_recipes.py

# the rivals are tested if `make rivals-env` was run
test-real: models
	@test -x "$${EDGEWHISPER_RIVALS_PYTHON:-$(RIVALS)/bin/python}" || \
	  echo "note: the tests of the rivals are skipped, because there is no $(RIVALS): make rivals-env"
	$(PYTEST) --no-loadscope-reorder -m real $(LONG) $(wildcard tests/real/test_*.py)

# hundreds of mutated inputs for each reader
test-slow: $(READY)
	$(PYTEST) -m slow

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

interop: $(READY) $(INTEROP)/optimum/.ready $(INTEROP)/sherpa/.ready $(INTEROP)/js/.ready
	rm -rf $(INTEROP)/work
	$(BIN)/python -m tests.interop.check $(INTEROP) $(INTEROP)/work

$(INTEROP)/%/.ready: tests/interop/requirements-%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install -q -r $<
	@touch $@

# --ignore-scripts: an install script would download a native runtime that is not used
$(INTEROP)/js/.ready: tests/interop/package.json
	@sh tests/helpers/system-packages.sh 'node --version' nodejs
	@sh tests/helpers/system-packages.sh 'npm --version' npm
	@mkdir -p $(@D) && cp $< $(@D)
	@if npm --version >/dev/null 2>&1; then \
	  cd $(@D) && npm install --silent --no-fund --no-audit --ignore-scripts && touch .ready; \
	else echo "note: transformers.js is not run, because node or npm is missing"; fi

# torch first and by exact version: with a range, pip could choose a build with gigabytes of CUDA
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is too old; EdgeWhisper needs Python 3.11 or newer"; \
	    echo "try:   make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@sh tests/helpers/system-packages.sh '$(PYTHON) -c "import ensurepip"' python3-venv
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0 setuptools
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $(READY)

# with systemd, installing the package would start a server that listens on all interfaces
sshd:
	@test -d /run/systemd/system || sh tests/helpers/system-packages.sh 'test -x /usr/sbin/sshd' openssh-server

# takes minutes; builds the emulated machine in build/aarch64 on the first run, as `make aarch64` does
test-devices: $(READY) sshd
	@sh tests/helpers/system-packages.sh 'qemu-aarch64 --version' qemu-user
	@sh tests/helpers/system-packages.sh 'qemu-system-aarch64 --version' qemu-system-arm
	@sh tests/helpers/system-packages.sh 'test -x /usr/sbin/depmod -o -x /sbin/depmod' kmod
	@sh tests/helpers/system-packages.sh 'cpio --version' cpio
	@sh tests/helpers/system-packages.sh 'gcc --version' gcc
	@sh tests/helpers/system-packages.sh 'adb --version' adb
	@$(BIN)/python tests/helpers/adbd.py || echo "note: the tests of a phone on loopback are skipped, because adbd is missing"
	@sh tests/helpers/system-packages.sh 'chromium --version' chromium
	@sh tests/helpers/system-packages.sh 'npm --version' npm
	$(BIN)/python -m pytest -m devices

# takes tens of minutes; builds the emulated machine in build/aarch64 on the first run
aarch64: $(READY)
	@sh tests/helpers/system-packages.sh 'qemu-aarch64 --version' qemu-user
	@sh tests/helpers/system-packages.sh 'gcc --version' gcc
	$(BIN)/python -m benchmarks.aarch64

rivals-env: $(RIVALS)/.ready

# whisper.cpp would use AMX tiles, and crash if the kernel does not grant them
NO_AMX := $(if $(filter x86_64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)

# removed after a failure: the tests of the rivals run if its interpreter exists
# --no-cache-dir: a cached build lacks the run path, and its libraries do not find each other
$(RIVALS)/.ready: benchmarks/rivals/requirements.txt $(READY)
	$(BIN)/python -m venv --clear $(RIVALS)
	$(RIVALS)/bin/python -m pip install -q -r benchmarks/rivals/requirements.txt || \
	  { rm -rf $(RIVALS); false; }
	@if c++ --version >/dev/null 2>&1; then \
	  echo "building whisper.cpp from its source package (a few minutes)"; \
	  CFLAGS="$(NO_AMX)" CXXFLAGS="$(NO_AMX)" CMAKE_INSTALL_RPATH='$$ORIGIN' CMAKE_BUILD_WITH_INSTALL_RPATH=ON \
	  $(RIVALS)/bin/python -m pip install -q --no-cache-dir --no-deps --no-binary pywhispercpp \
	    --target $(RIVALS)/source $$(grep ^pywhispercpp== benchmarks/rivals/requirements.txt) || \
	  { rm -rf $(RIVALS)/source; echo "note: whisper.cpp could not be built; its wheel is used"; }; \
	else echo "note: the wheel of whisper.cpp is used, because there is no C++ compiler"; fi
	@touch $@

clean:
	rm -rf $(VENV) $(RIVALS) edgewhisper-runs
