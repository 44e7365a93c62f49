"""A world for each test, and a look at what it has left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.harness import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A state folder, store and processes of its own; nothing may be left in /dev/shm, /tmp or the process table."""
    shm = set(os.listdir("/dev/shm"))
    world = World(tmp_path)
    try:
        yield world
        world.until_empty(patience_s=30)
        # torch makes an empty folder for its compiler, and torchrun one for its logs, with or without ckptd.
        assert [name for name in os.listdir(world.temporary) if not name.startswith("torch")] == []
        ours = [name for name in set(os.listdir("/dev/shm")) - shm if "ckptd" in name]
        assert not ours
    finally:
        world.close()


@pytest.fixture
def light(world: World) -> World:
    """The world, with jobs that train without torch."""
    world.leave_out_torch()
    return world
