"""Starts the ranks of one contender, ckptd's under `ckptctl run` and all others as forks of one template, and waits."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from tests.bench import catalogue, probes
from tests.bench.plan import Plan

ROOT = Path(__file__).parents[2]
PRELOAD = ("torch", "torch._dynamo", "torch.distributed.checkpoint")
"""What ranks would import while the clock is running: the first optimizer of a process imports torch._dynamo."""


class WorldError(Exception):
    """A contender could not be measured; the message ends with its ranks' last words."""


def prepare(ranks: int) -> None:
    """Set what all ranks inherit, and start the template of those that ckptd does not start."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 2) // ranks))
    os.environ["PYTHONWARNINGS"] = "ignore"
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


@contextlib.contextmanager
def place(base: str | None) -> Iterator[Path]:
    """Give a folder on the disk to be measured, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="ckptd-bench-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(plan: Plan) -> dict[str, Any]:
    """Measure one contender once: its ranks' figures, and how many cores everything else used meanwhile.

    Raises `WorldError` when a rank ends badly.
    """
    begin_s, begin_busy_s = probes.machine()
    meter = _Meter()
    failed = (_under_ckptd if catalogue.is_ckptd(plan.contender) else _by_hand)(plan, meter)
    if failed:
        raise WorldError(f"{plan.contender} failed:\n{(plan.place / 'log').read_text(errors='replace')[-3000:]}")
    end_s, end_busy_s = probes.machine()
    return {
        "ranks": [json.loads((plan.place / f"rank{rank}.json").read_text()) for rank in range(plan.ranks)],
        "other_cores": max(0.0, (end_busy_s - begin_busy_s - meter.used_s) / (end_s - begin_s)),
        "seconds": end_s - begin_s,
    }


def _under_ckptd(plan: Plan, meter: _Meter) -> bool:
    """Run the ranks to their end under `ckptctl run`; return whether that failed."""
    mode = plan.contender.removeprefix(catalogue.CKPTD)
    process = start_ckptd(plan.place, [str(ROOT / "tests/bench/rank.py"), plan.to_json()], plan, mode)
    try:
        while process.poll() is None:
            meter.look([process.pid])
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        return process.returncode != 0
    finally:
        process.kill()  # launcher and ranks end with their agent
        process.wait()


def _by_hand(plan: Plan, meter: _Meter) -> bool:
    """Run the ranks to their end as forks of the template; return whether one failed."""
    ranks = _start_ranks(plan)
    try:
        while alive := [rank for rank in ranks if rank.is_alive()]:
            meter.look([rank.pid for rank in alive if rank.pid])
            if any(rank.exitcode for rank in ranks):
                break
            alive[0].join(0.2)
        return any(rank.exitcode for rank in ranks)
    finally:
        for rank in ranks:
            for child in _descendants(rank.pid) if rank.is_alive() else ():
                child.kill()
            rank.kill()
            rank.join()


def _descendants(pid: int | None) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def restores(plan: Plan, what: str, *, prepared: bool) -> list[list[dict[str, Any]]]:
    """Return, by rank, what ckptd's restores from "memory" or "disk" took, each in processes that are new.

    Raises `WorldError` when a run ends badly.
    """

    def once(order: str) -> None:
        script = [str(ROOT / "tests/bench/restore.py"), plan.to_json(), order, "prepared" if prepared else "fresh"]
        if start_ckptd(plan.place, script, plan, "off", restarts=2 * plan.repeats).wait():
            log = (plan.place / "log").read_text(errors="replace")
            raise WorldError(f"restore from {what} failed:\n{log[-3000:]}")

    if what == "memory":
        once("memory")
    else:
        once("checkpoint")
        for _ in range(plan.repeats):
            probes.drop_cache(path for path in (plan.place / "store").rglob("*") if path.is_file())
            once("disk")
    notes = [(plan.place / f"restores{rank}").read_text().splitlines() for rank in range(plan.ranks)]
    found = [[json.loads(line) for line in lines] for lines in notes]
    wrong = [note for rank in found for note in rank if not note["right"]]
    if wrong:
        raise WorldError(f"restored something else than was captured: {wrong}")
    return found


class _Meter:
    """The CPU time of processes and all that descend from them, summed while they come and go."""

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}

    def look(self, pids: Sequence[int]) -> None:
        """Note what every process has used so far."""
        for pid in pids:
            for each in (pid, *(child.pid for child in _descendants(pid))):
                self._seen[each] = max(self._seen.get(each, 0.0), probes.cpu_s(each))

    @property
    def used_s(self) -> float:
        """All of it."""
        return sum(self._seen.values())


def start_ckptd(folder: Path, command: list[str], plan: Plan, mode: str, restarts: int = 0) -> subprocess.Popen[bytes]:
    """Start `ckptctl run` around a command; its output goes to the folder's log."""
    options = [
        f"--nproc={plan.ranks}", "--every=1h", "--name=bench", f"--keep-last={plan.keep_last}",
        f"--store={folder / 'store'}", f"--preload={','.join(PRELOAD)}", f"--overlap={mode}",
        f"--max-restarts={restarts}",
    ]  # fmt: skip
    env = {**os.environ, "CKPTD_HOME": str(folder / "home")}
    with (folder / "log").open("ab") as log:
        full = [sys.executable, "-m", "ckptd.cli.main", "run", *options, "--", *command]
        return subprocess.Popen(full, env=env, stdout=log, stderr=log, cwd=ROOT)


def _start_ranks(plan: Plan) -> list[BaseProcess]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "tests.bench.rank"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: list[BaseProcess] = []
    for rank in range(plan.ranks):
        process = context.Process(target=_rank, args=(plan.to_json(), rank, port))
        process.start()
        ranks.append(process)
    return ranks


def _rank(text: str, rank: int, port: int) -> None:
    """Be one rank, in a fork of the template."""
    plan = Plan.from_json(text)
    os.setsid()
    log = os.open(plan.place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": plan.ranks, "LOCAL_WORLD_SIZE": plan.ranks}
    os.environ.update({name: str(value) for name, value in own.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from tests.bench.rank import measure

    measure(plan)
