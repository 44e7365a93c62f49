"""A disk without room: training goes on, what policy allows goes, and nothing that is there is damaged."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.harness import LIGHT, World, until

DISK_BYTES = 16 * 2**20
CHUNK = b"x" * 2**16


@pytest.fixture
def small_disk(light: World) -> Iterator[Path]:
    """The world's store, as a filesystem of its own that holds a few checkpoints."""
    world = light
    world.store.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "ckptd-test", str(world.store)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small filesystem needs root")
    try:
        yield world.store
    finally:
        for process in world.processes():  # of a test that has failed
            with contextlib.suppress(psutil.Error):
                process.kill()
        unmount = ["umount", str(world.store)]
        until(lambda: subprocess.run(unmount, check=False, capture_output=True).returncode == 0, "the unmounting")


def events(world: World, process: subprocess.Popen[str], event: str) -> list[dict[str, object]]:
    """What was logged under a name so far; a line that is being written is left out."""
    lines = [line for line in world.output(process).splitlines(keepends=True) if f'"event": "{event}"' in line]
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def fill(path: Path) -> None:
    """Take all the room that there is now."""
    with path.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(CHUNK)
        except OSError:
            return


def test_a_full_disk_costs_old_checkpoints_and_no_training(world: World, small_disk: Path) -> None:
    """What only keep_last keeps makes room; without any a snapshot is skipped and said, and commits resume later."""
    run = world.run(LIGHT, 100_000, 0.02, nproc=1, options=("--keep-last", "50"))
    world.until_training("train", committed=True)
    until(lambda: any(item["freed_bytes"] for item in events(world, run, "garbage collected")), "room on a full disk")
    filler = small_disk / "filler"

    def skipped() -> list[dict[str, object]]:
        fill(filler)
        skips = events(world, run, "checkpoint skipped")
        return [item for item in skips if "full" in str(item["reason"])]

    fields = until(skipped, "a skip for want of room")[0]
    assert int(str(fields["missing_bytes"])) > 0
    status = world.status("train")
    assert status is not None
    before = status["step"]
    until(lambda: (world.status("train") or {"step": 0})["step"] > before + 20, "training on a full disk")
    assert all(item["intact"] for item in world.json("verify", "train", "--all"))
    filler.unlink()
    committed = len(events(world, run, "checkpoint committed"))
    until(lambda: len(events(world, run, "checkpoint committed")) > committed, "a commit when there is room again")
    assert world.ctl("stop", "train").returncode == 0
    world.finish(run, code=75)
    assert all(item["intact"] for item in world.json("verify", "train", "--all"))
    assert "Traceback" not in world.output(run)


def test_a_restart_on_a_full_disk(world: World, small_disk: Path) -> None:
    """Without room for the record of the next generation a job waits for it, and then loses no sealed step."""
    run = world.run(LIGHT, 100_000, 0.02, nproc=1, options=("--keep-last", "4"))
    until(lambda: len(events(world, run, "checkpoint committed")) >= 3, "three commits")
    filler = small_disk / "filler"

    def skipped() -> bool:
        fill(filler)
        return any("full" in str(item["reason"]) for item in events(world, run, "checkpoint skipped"))

    until(skipped, "a skip for want of room")
    world.kill_rank("train", 0)
    until(lambda: (fill(filler), events(world, run, "claim postponed"))[1], "a restart that finds no room")
    filler.unlink()
    started = until(lambda: events(world, run, "generation started")[1:], "generation 2")
    assert started[0]["restore_tier"] == "memory"
    assert world.ctl("stop", "train").returncode == 0
    world.finish(run, code=75)
    assert all(item["intact"] for item in world.json("verify", "train", "--all"))
