# `make bench` and `make test` share one environment, .venv. Paths are relative, so the clone may lie anywhere.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
FLOOR := transformers==5.17.0
# A process for every core, each with one thread: most tests are too small for more. What is skipped is named, and what is
# slow: CI has to be done in 25 minutes.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --dist worksteal -rs --durations 30
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/*)

.PHONY: bench test test-newest test-floor lint sanitize docs build clean

bench: .venv/built
	$(PY) -m flowcut_kernels.bench.cli

# What needs one core is done side by side: the tests need all.
test:
	$(MAKE) --jobs 2 lint sanitize .venv/floor/ready
	$(MAKE) test-newest test-floor

test-newest: .venv/built
	$(PYTEST) tests

# The oldest supported transformers, in front of the environment's own. Which one it is has no part in Triton's
# interpreter, which takes minutes, nor in what is marked so.
test-floor: .venv/built .venv/floor/ready
	PYTHONPATH=.venv/floor $(PYTEST) -k "not triton" -m "not any_transformers" tests/models tests/test_cache.py

lint: .venv/built
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# C++ forms that go by index, and the page planner, under the address and undefined-behaviour sanitizers.
sanitize:
	tests/sanitize/run.sh $(CXX)

# The API reference from docstrings, and figures from benchmarks/results: tests fail where the committed ones differ.
docs: .venv/built
	$(PY) docs/generate_api.py
	$(PY) docs/fill_tables.py

build: .venv/built

.venv/built: .venv/ready $(SOURCES)
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

# torch first: its pin decides whether the CPU or the CUDA build comes.
.venv/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt torch numpy
	$(PIP) --constraint constraints.txt setuptools wheel cmake ninja pybind11
	$(PIP) --constraint constraints.txt transformers safetensors triton pytest pytest-xdist hypothesis scikit-image ruff mypy \
		accelerate playwright rich typer matplotlib scikit-learn pillow jinja2 optuna scipy greenlet \
		datasets evaluate sacrebleu loguru tenacity pytz pytablewriter
	$(PIP) --constraint constraints.txt --no-deps lmms-eval  # the line above has what its evaluator imports
	touch $@

.venv/floor/ready: .venv/ready
	grep -v '^transformers' constraints.txt > .venv/floor-constraints.txt
	$(PIP) --constraint .venv/floor-constraints.txt --no-warn-conflicts --target .venv/floor --upgrade "$(FLOOR)"
	touch $@

clean:
	rm -rf .venv build *.egg-info flowcut_kernels/*.so flowcut_kernels/_build_info.json
