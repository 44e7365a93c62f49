# Everything a newcomer needs: `make demo` and `make test`. Each target makes .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Tests start hundreds of processes: without bytecode each would compile ckptd anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-s3 test lint format chaos faulttable faults bench powercut crashmatrix clean venv

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
	$(BIN)/python -m pytest -n 4 --dist loadgroup -m 'not chaos and not faulttable and not faults and not cuda and not systemd'

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Random faults against a real job, and what must hold after each: make chaos ARGS="--faults 200"; see tests/chaos.
chaos: venv
	$(BIN)/python -m pytest -m chaos tests/end_to_end
	$(BIN)/python -m tests.chaos.campaign $(ARGS)

# Every way in which a job can fail, as a table: found after, steps lost, verdict.
faulttable: venv
	CKPTD_FAULT_TABLE=build/fault-table.md $(BIN)/python -m pytest -m faulttable -n 0 -s tests/faults

# An object store that fails in every way: a proxy with faults before a real server, with stalls as long as real ones.
faults: venv
	$(BIN)/python -m pytest -m faults tests/object_store tests/end_to_end

# The service under a systemd of its own: restarts, kills, hangs, stops and reboots while a job trains; needs root.
systemd: venv
	$(BIN)/python -m pytest -m systemd tests/systemd

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
