# Everything a newcomer needs: `make demo` and `make test`. Each target makes .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Tests start hundreds of processes: without bytecode each would compile ckptd anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-s3 test lint format chaos faults bench powercut crashmatrix clean venv

venv: $(STAMP)

# constraints.txt pins every package: without it pip's resolver can search for minutes.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ckptd needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[torch,s3,dev]'
	touch $(STAMP)

demo: venv
	$(BIN)/python examples/demo.py

# The same with a bucket: a real S3 server on loopback, a kill, the disk wiped, and a restore from the bucket.
demo-s3: venv
	PYTHONPATH=. $(BIN)/python examples/demo_s3.py

test: venv lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m 'not chaos and not faults and not cuda'

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Real kills at random moments, longer than `make test` should take.
chaos: venv
	$(BIN)/python -m pytest -m chaos tests/chaos

# An object store that fails in every way: a proxy with faults before a real server, with stalls as long as real ones.
faults: venv
	$(BIN)/python -m pytest -m faults tests/object_store tests/end_to_end

# What is committed survives power cuts of a QEMU guest: make powercut ARGS="--kills 3"; see tests/powercut/README.md.
powercut: venv
	$(BIN)/python -m tests.powercut $(ARGS)

# The agent killed at every call to the file system and the object store, and every fault of a disk; see tests/crash.
crashmatrix: venv
	$(BIN)/python -m pytest -m chaos tests/crash
	$(BIN)/python -m tests.crash $(ARGS)

# Figures beside what a user would pick instead: make bench ARGS="--quick"; see tests/bench/README.md.
bench: venv
	$(BIN)/python -m tests.bench.compare $(ARGS)

format: venv
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
