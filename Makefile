# `make demo` and `make test` are all a user needs; both set up what they use, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RIVALS := build/rivals
INTEROP := build/interop

.PHONY: demo test models test-real test-slow test-devices sshd check interop aarch64 rivals-env clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    compress, export and measure Whisper tiny.en; ends in a table"
	@echo "make test    run the tests"
	@echo "make models  fetch OpenAI's tiny.en and base into build/models"
	@echo "make test-real   run the tests on these models, and on the engines if rivals-env was made"
	@echo "make test-slow   run those that take minutes"
	@echo "make test-devices   run those that need an emulated device"
	@echo "make interop run artifacts of other layouts in optimum, transformers.js and sherpa-onnx"
	@echo "make aarch64 count instructions on emulated ARM cores, hold them against those kept"
	@echo "make check   format, lint, types, direction of imports"
	@echo "make rivals-env   install faster-whisper, whisper.cpp, sherpa-onnx, for bench --rival"

demo: $(READY)
	$(BIN)/edgewhisper demo

# one thread a worker: two workers use both cores
test: $(READY) sshd
	@sh tests/helpers/system-packages.sh 'espeak-ng --version' espeak-ng
	@sh tests/helpers/system-packages.sh 'flite -lv' flite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

models: $(READY)
	$(BIN)/python -m edgewhisper.checkpoints.fetch tiny.en base --out build/models

# the engines of `make rivals-env` are tested where that was made
test-real: models
	$(BIN)/python -m pytest -m real tests/real

# hundreds of mutated inputs for each reader
test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

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

# --ignore-scripts: a package's install script would fetch a native runtime that is not used
$(INTEROP)/js/.ready: tests/interop/package.json
	@sh tests/helpers/system-packages.sh 'node --version' nodejs
	@sh tests/helpers/system-packages.sh 'npm --version' npm
	@mkdir -p $(@D) && cp $< $(@D)
	@if npm --version >/dev/null 2>&1; then \
	  cd $(@D) && npm install --silent --no-fund --no-audit --ignore-scripts && touch .ready; \
	else echo "note: without node and npm transformers.js is not run"; fi

# torch first and by exact version: a range would let pip choose a build with gigabytes of CUDA
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is too old, 3.11 or newer is needed."; \
	    echo "try:   make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@sh tests/helpers/system-packages.sh '$(PYTHON) -c "import ensurepip"' python3-venv
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0 setuptools
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $(READY)

# where systemd runs, the package would start a server that listens to the whole network
sshd:
	@test -d /run/systemd/system || sh tests/helpers/system-packages.sh 'test -x /usr/sbin/sshd' openssh-server

# minutes of emulation; builds its machine in build/aarch64 on the first run, as `make aarch64`
test-devices: $(READY) sshd
	@sh tests/helpers/system-packages.sh 'qemu-aarch64 --version' qemu-user
	@sh tests/helpers/system-packages.sh 'qemu-system-aarch64 --version' qemu-system-arm
	@sh tests/helpers/system-packages.sh 'test -x /usr/sbin/depmod -o -x /sbin/depmod' kmod
	@sh tests/helpers/system-packages.sh 'cpio --version' cpio
	@sh tests/helpers/system-packages.sh 'gcc --version' gcc
	@sh tests/helpers/system-packages.sh 'adb --version' adb
	@$(BIN)/python tests/helpers/adbd.py || echo "note: without adbd no phone is played on loopback"
	@sh tests/helpers/system-packages.sh 'chromium --version' chromium
	@sh tests/helpers/system-packages.sh 'npm --version' npm
	$(BIN)/python -m pytest -m devices

# tens of minutes of emulation; builds its machine in build/aarch64 on the first run
aarch64: $(READY)
	@sh tests/helpers/system-packages.sh 'qemu-aarch64 --version' qemu-user
	@sh tests/helpers/system-packages.sh 'gcc --version' gcc
	$(BIN)/python -m benchmarks.aarch64

rivals-env: $(RIVALS)/.ready

# whisper.cpp would use tiles on processors that have them, and end where the kernel grants none
NO_AMX := $(if $(filter x86_64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)

# pip would take a build of its cache, whose libraries do not find each other without the run path
$(RIVALS)/.ready: benchmarks/rivals/requirements.txt $(READY)
	$(BIN)/python -m venv --clear $(RIVALS)
	$(RIVALS)/bin/python -m pip install -q -r benchmarks/rivals/requirements.txt
	@if c++ --version >/dev/null 2>&1; then \
	  echo "building whisper.cpp from its source package (a few minutes)"; \
	  CFLAGS="$(NO_AMX)" CXXFLAGS="$(NO_AMX)" CMAKE_INSTALL_RPATH='$$ORIGIN' CMAKE_BUILD_WITH_INSTALL_RPATH=ON \
	  $(RIVALS)/bin/python -m pip install -q --no-cache-dir --no-deps --no-binary pywhispercpp \
	    --target $(RIVALS)/source $$(grep ^pywhispercpp== benchmarks/rivals/requirements.txt) || \
	  { rm -rf $(RIVALS)/source; echo "note: it could not be built; its wheel is measured"; }; \
	else echo "note: without a C++ compiler whisper.cpp is measured as its wheel"; fi
	@touch $@

clean:
	rm -rf $(VENV) $(RIVALS) edgewhisper-runs
