# Two commands are enough on a fresh machine with Python 3.11: `make demo` (see README) and `make test`.
PYTHON ?= python3
# For a machine without a GPU there is a smaller wheel:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo TORCH="torch==2.13.0+cpu"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: the suite compares losses to the fifth digit and runs two ranks on two cores. Byte code is kept,
# also where the environment says otherwise: each test process would compile all tests anew, for ten seconds.
ENV := PYTHONDONTWRITEBYTECODE= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PATH="$(abspath $(BIN)):$$PATH"

# Where the demo writes; it wants a new folder.
OUT ?= runs/demo

.PHONY: install demo docs test test-slow test-browser test-versions versions-lock test-cluster cluster-packages lint parity clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

# Data, a small model, sft → stage1 → stage2 on two ranks under ZeRO-3, export, scores: seven minutes on two cores.
demo: install
	$(ENV) $(BIN)/python examples/demo.py --out $(OUT)

# Three processes on two cores, since many tests wait; the long files, those of tests/dist, first: without the flag
# pytest-xdist begins with the files that have most tests. A file's tests share what was trained for them.
test: install
	$(ENV) $(BIN)/python -m pytest tests/dist tests/unit -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder

# Three processes on two cores, since ranks wait for each other; the longest files first (tests/slow/conftest.py).
test-slow: install
	$(ENV) $(BIN)/python -m pytest tests/dist tests/slow tests/unit/docs tests/unit/study -m slow --numprocesses 3 --dist loadfile --no-loadscope-reorder

# Every page of the site, a study's report and a page of inspect, in Chromium; needs cluster-packages.
test-browser: docs
	$(ENV) $(BIN)/python -m pytest tests/browser -m slow

# A short suite with the oldest, a middle and the newest set of libraries (tests/versions/*.txt), each in its own
# environment under ~/.cache/mirage-ds/versions: 14 GB, built where it is missing.
test-versions: install
	$(BIN)/python tests/versions/run.py

# Chooses the versions anew.
versions-lock: install
	$(BIN)/python tests/versions/run.py lock

# Several hosts as namespaces of this machine, with the real launchers; needs root and cluster-packages. Three processes:
# a test waits for a lost host or a time limit while others compute.
test-cluster: install
	$(ENV) $(BIN)/python -m pytest tests/cluster --numprocesses 3 --dist loadfile --no-loadscope-reorder

# What the cluster and browser suites need; on Debian and Ubuntu, as root. RUNLEVEL=1: installing a server must not start it.
cluster-packages:
	apt-get update -qq
	RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$(cat tests/cluster/packages.txt)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m benchmarks.house

# The site, into site/: every link and anchor is checked. Its packages are installed here, nothing else needs them.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# DIR holds what the public Mirage code computed; its format is described in tests/parity/check.py.
parity: install
	$(ENV) $(BIN)/python tests/parity/check.py $(DIR)

clean:
	rm -rf $(VENV) build dist site runs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
