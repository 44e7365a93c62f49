"""Which damages a reader notices: ckptd beside torch.save and torch.distributed.checkpoint."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench import catalogue, machine, world
from tests.bench.measure import table
from tests.bench.plan import Plan, Shape

MIB = 16
KILLED_MIB = 256
"""Large enough to be killed in the middle of its flush."""


def _inside(path: Path) -> int:
    """Return a place well inside a tensor: the very middle may be between two."""
    return path.stat().st_size * 11 // 20


def flip(path: Path) -> None:
    """Flip one bit of a tensor."""
    with path.open("r+b") as file:
        at = _inside(path)
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def zeros(path: Path) -> None:
    """Put 4 KiB of zeros into a tensor."""
    with path.open("r+b") as file:
        file.seek(_inside(path) // 4096 * 4096)
        file.write(bytes(4096))


def halve(path: Path) -> None:
    """Cut it in half."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "nothing": lambda _: None,
    "one flipped bit": flip,
    "4 KiB of zeros": zeros,
    "cut in half": halve,
    "file gone": Path.unlink,
}
BEFORE_MANIFEST = "killed before the manifest"
MIDWAY = "killed midway over an older checkpoint"


def biggest(folder: Path) -> Path:
    """Return the largest file of a folder: the data and not the metadata."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def verdict(exit_code: int, notes: list[dict[str, object]], newest: int, error: str, *, committed: bool = True) -> str:
    """Return in words what became of a load by ckptd, given what the rank has noted.

    `committed` says whether any manifest was there: without, there is no checkpoint that could be missed.
    """
    if exit_code:
        return f"refused: {error}"
    if not notes:
        return "STARTED ANEW, no word" if committed else "begins anew: nothing was committed"
    note = notes[-1]
    if not note["right"]:
        return "LOADED WRONG, no word"
    return "loads, right" if note["step"] == newest else f"served from an older good copy (step {note['step']})"


class Ckptd:
    """Jobs of one rank in folders of their own."""

    def __init__(self, folder: Path, mode: str) -> None:
        self._folder, self._mode = folder, mode
        self._count = 0

    def plan(self, name: str, mib: float = MIB) -> Plan:
        """Return the plan of a job in a folder of its own."""
        place = self._folder / name
        place.mkdir(exist_ok=True)
        return Plan(catalogue.CKPTD + self._mode, str(place), ranks=1, shape=Shape(mib, 30), keep_last=3)

    def start(self, plan: Plan, order: str) -> subprocess.Popen[bytes]:
        """Start a job."""
        script = [str(world.ROOT / "tests/bench/restore.py"), plan.to_json(), order, "prepared"]
        return world.start_ckptd(plan.place, script, plan, self._mode)

    def steps(self, plan: Plan) -> list[Path]:
        """Return the folders of a job's steps, oldest first."""
        return sorted((plan.place / "store" / "bench").glob("g*/s*"), key=lambda path: path.name)

    def load(self, source: Plan, damage: Callable[[Path], None], *, alone: bool) -> str:
        """Damage a copy of a job's newest checkpoint, leave the older ones or not, and see what a new run loads."""
        self._count += 1
        plan = self.plan(f"copy{self._count}", source.shape.size_mib)
        for path in source.place.glob("fingerprint*"):
            shutil.copy(path, plan.place)
        shutil.copytree(source.place / "store", plan.place / "store")
        *older, newest = self.steps(plan)
        for path in older if alone else ():
            shutil.rmtree(path)
        damage(newest)
        committed = any((plan.place / "store").rglob("manifest.json"))
        exit_code = self.start(plan, "disk").wait()
        notes = plan.place / "restores0"
        found = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
        error = _error((plan.place / "log").read_text())
        said = verdict(exit_code, found, int(newest.name[1:]), error, committed=committed)
        shutil.rmtree(plan.place)
        return said

    def kill_midway(self) -> Plan:
        """Kill the agent while a flush is under way, with an older checkpoint there."""
        plan = self.plan("killed", KILLED_MIB)
        process = self.start(plan, "endless")
        end_s = time.monotonic() + 120
        while time.monotonic() < end_s:
            steps = self.steps(plan)
            torn = [path for path in steps[1:] if not (path / "manifest.json").exists() and any(path.iterdir())]
            if torn:
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(1)  # launcher and rank end with their agent
        return plan


def _error(log: str) -> str:
    """Return the first clause of the last error that `ckptctl` has printed."""
    lines = [line for line in log.splitlines() if "error: " in line]
    return lines[-1].rpartition("error: ")[2].partition(":")[0] if lines else log[-80:]


def run(args: argparse.Namespace) -> list[dict[str, str]]:
    """Print and return the table."""
    rows = [{"damage": what} for what in (*DAMAGES, BEFORE_MANIFEST, MIDWAY)]
    with world.place(args.dir) as folder:
        place = folder / "peers"
        place.mkdir()
        peers = subprocess.run(
            [sys.executable, "-m", "tests.bench.damage_peers", str(place)],
            capture_output=True,
            text=True,
            cwd=world.ROOT,
        )
        if peers.returncode:
            raise world.WorldError(f"peers failed:\n{peers.stderr[-3000:]}")
        for row, found in zip(rows, json.loads(peers.stdout), strict=True):
            row.update(found)
        job = Ckptd(folder, "auto")
        source = job.plan("source")
        if job.start(source, "twice").wait():
            raise world.WorldError(f"ckptd failed:\n{(source.place / 'log').read_text()[-3000:]}")
        for row, (what, damage) in zip(rows, DAMAGES.items(), strict=False):
            print(f"... ckptd: {what}", file=sys.stderr, flush=True)
            for title, alone in (("ckptd", False), ("ckptd, no older copy", True)):
                row[title] = job.load(source, lambda path, damage=damage: damage(biggest(path)), alone=alone)  # type: ignore[misc]
        for title, alone in (("ckptd", False), ("ckptd, no older copy", True)):
            rows[-2][title] = job.load(source, lambda path: (path / "manifest.json").unlink(), alone=alone)
        print(f"... ckptd: {MIDWAY}", file=sys.stderr, flush=True)
        rows[-1]["ckptd"] = job.load(job.kill_midway(), lambda _: None, alone=False)
        rows[-1]["ckptd, no older copy"] = "-"
    print(f"\n{machine.line()}\n")
    print(table(rows))
    return rows
