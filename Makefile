# make demo   set up .venv, compile all-MiniLM-L6-v2 for this machine, compare and measure it
# make test   set up .venv, run the tests
# make tools  install what tests of other machines' programs need: an ARM emulator and compiler, Verilog tools
# make lint   ruff and mypy

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check --quiet
STAMP  := $(VENV)/.installed
TOOLS  := $(VENV)/.tools

# Debian packages of the tests; without them, and without the right to install them, those tests skip and say why.
PACKAGES := qemu-user g++-aarch64-linux-gnu libc6-dev-arm64-cross verilator yosys yosys-dev

.PHONY: demo test tools lint format backend clean

# torch first and pinned: left to the other packages, pip would fetch its CUDA build.
$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ".[dev,demo]"
	touch $@

demo: $(STAMP)
	$(BIN)/qcompile demo

test: $(STAMP) $(TOOLS)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

tools: $(TOOLS)

$(TOOLS): $(STAMP) Makefile
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends $(PACKAGES) >/dev/null; \
	fi || true
	for tool in qemu-aarch64 aarch64-linux-gnu-g++ verilator yosys; do \
	  command -v $$tool >/dev/null || echo "$$tool is not there: tests that need it skip"; \
	done
	$(PIP) install -c constraints.txt -e ".[mlir]" || echo "torch-mlir is not there: tests that need it skip"
	$(BIN)/python -m qcompile.backends.emulate || echo "tests that run ARM programs skip"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The ONNX backend node tests, all of them; writes docs/onnx-operators.md.
backend: $(STAMP)
	$(BIN)/python benchmarks/onnx_backend.py

clean:
	rm -rf $(VENV) build *.egg-info artifacts
