"""One job for all lines of the fault table, and the table itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.harness import World
from tests.faults.job import Job
from tests.faults.surroundings import Clock, MemoryGroup, memory_group, mount_disk, unmount_disk
from tests.faults.table import Table


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    """The lines of all tests; printed at the end, and written to $CKPTD_FAULT_TABLE if that is set."""
    table = Table()
    yield table
    print("\n\n" + table.markdown())
    if "CKPTD_FAULT_TABLE" in os.environ:
        table.write(Path(os.environ["CKPTD_FAULT_TABLE"]))


@pytest.fixture(scope="module")
def group() -> Iterator[MemoryGroup | None]:
    """A memory cgroup for the job, None where there can't be one."""
    group = memory_group(f"ckptd-faults-{os.getpid()}")
    yield group
    if group is not None:
        group.remove()


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Clock:
    """The wall clock of the job's node."""
    return Clock(tmp_path_factory.mktemp("clock"))


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory, group: MemoryGroup | None, clock: Clock, table: Table
) -> Iterator[Job]:
    """A job that trains through all of it, on a small disk of its own where this user may mount one."""
    shm = set(os.listdir("/dev/shm"))
    world = World(tmp_path_factory.mktemp("faults"))
    mounted = mount_disk(world.store)
    job = Job(
        world,
        settings={"numbers": {"policy": "step_back"}},
        prefix=() if group is None else group.prefix,
        env=clock.env,
    )
    try:
        job.start()
        yield job
        table.interval_steps = job.interval_steps
        job.close()
        world.until_empty(patience_s=30)
        assert [name for name in set(os.listdir("/dev/shm")) - shm if "ckptd" in name] == []
    finally:
        world.close()
        if mounted:
            unmount_disk(world.store)
