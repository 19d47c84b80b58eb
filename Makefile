# make demo   set up .venv, compile all-MiniLM-L6-v2 for this machine, compare and measure it
# make test   set up .venv, run the tests
# make arm    install what the tests of ARM programs need: qemu and a cross compiler with apt, TVM's ARM run-time with pip
# make lint   ruff and mypy

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check --quiet
STAMP  := $(VENV)/.installed

.PHONY: demo test arm lint format backend clean

# torch first and pinned: left to the other packages, pip would fetch its CUDA build.
$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ".[dev,demo]"
	touch $@

demo: $(STAMP)
	$(BIN)/qcompile demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

# Without these, tests that run ARM programs skip.
arm: $(STAMP)
	command -v qemu-aarch64 >/dev/null && command -v aarch64-linux-gnu-g++ >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends qemu-user g++-aarch64-linux-gnu libc6-dev-arm64-cross; }
	$(BIN)/python -m qcompile.backends.emulate

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
