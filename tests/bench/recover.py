"""How long a job stands still when a rank is killed: from `kill -9` to the first finished step of all ranks.

`python -m tests.bench.recover`: ckptd beside torchrun with a DCP checkpoint and beside a bare prefork supervisor, all
with the same script. Contenders take turns; each start is killed several times, after a checkpoint each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from tests.bench import machine
from tests.bench.measure import show, spread

ROOT = Path(__file__).parents[2]
TOY = str(Path(__file__).with_name("recover_toy.py"))
RANKS = 2
PHASES = ("ranks gone", "respawn", "interpreter", "import", "join", "build", "restore", "first step")
_PATIENCE_S = 60.0
_POLL_S = 0.005
_NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Else all generations meet in one store, where a dead rank's address still is, and gloo's restart may stall."""
_FASTEST = ("--monitor-interval", "0.01")


@dataclass(frozen=True)
class Contender:
    """A way to keep a job going: what starts it, and what the script does."""

    name: str
    script: str
    launch: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""
    """A module that the script imports first."""

    def command(self, folder: Path, mib: int, device: str) -> list[str]:
        """Return the whole command."""
        words = [TOY, self.script, str(folder), str(mib), device, *([self.needs] if self.needs else [])]
        return [item.replace("FOLDER", str(folder)) for item in self.launch] + words


def _torchrun(*extra: str) -> tuple[str, ...]:
    module = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}")
    return (*module, "--max-restarts=100", *extra)


def _ckptd(preload: str = "torch") -> tuple[str, ...]:
    run = (sys.executable, "-m", "ckptd.cli.main", "run", f"--nproc={RANKS}", "--every=1s", "--store=FOLDER/store")
    return (*run, "--name=toy", "--log-format=json", f"--preload={preload}", "--")


CONTENDERS = (
    Contender("ckptd", "ckptd", _ckptd()),
    Contender("prefork supervisor, dcp.load", "dcp", (sys.executable, "-m", "tests.bench.prefork", str(RANKS))),
    Contender("torchrun, fastest settings", "dcp", _torchrun(*_FASTEST), _NEW_STORE),
    Contender("torchrun, own store", "dcp", _torchrun(), _NEW_STORE),
    Contender("torchrun, defaults", "dcp", _torchrun()),
    Contender("ckptd --preload torch,transformers", "ckptd", _ckptd("torch,transformers"), needs="transformers"),
    Contender("torchrun, fastest, transformers", "dcp", _torchrun(*_FASTEST), _NEW_STORE, needs="transformers"),
)


class Job:
    """One start of a contender, in a folder of its own."""

    def __init__(self, contender: Contender, folder: Path, mib: int, device: str) -> None:
        self.folder, self.contender = folder, contender
        (folder / "dcp").mkdir()
        env = {**os.environ, **contender.env, "CKPTD_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        env |= {"PYTHONPATH": str(ROOT), "CKPTD_SOCKET": str(folder / "ckptd.sock")}
        with (folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                contender.command(folder, mib, device),
                env=env,
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._events: list[dict[str, Any]] = []
        self._read_bytes = 0

    def events(self) -> list[dict[str, Any]]:
        """Return all events so far."""
        path = self.folder / "events"
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._read_bytes)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read_bytes += len(whole)
            self._events += map(json.loads, whole.splitlines())
        return self._events

    def log(self) -> list[dict[str, Any]]:
        """Return the lines of the log that are JSON."""
        lines = (self.folder / "log").read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def checkpoint_after(self, step: int) -> bool:
        """Whether something newer than `step` can be restored."""
        if self.contender.script == "ckptd":
            return any(line.get("event") == "checkpoint committed" and line["step"] > step for line in self.log())
        return any(item["what"] == "saved" and item["step"] > step for item in self.events())

    def settled(self) -> bool:
        """Whether the launcher has imported what the ranks needed beyond its list: some seconds, once in a run."""
        learns = self.contender.script == "ckptd" and self.contender.needs
        return not learns or any(line.get("event") == "launcher learned" for line in self.log())

    def until(self, holds: Any, what: str, patience_s: float = _PATIENCE_S) -> bool:
        """Wait; raises `RuntimeError` when the contender ends meanwhile, returns False after `patience_s`."""
        end_s = time.monotonic() + patience_s
        while time.monotonic() < end_s:
            if holds():
                return True
            if self._process.poll() is not None:
                said = (self.folder / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self.contender.name} ended before {what}:\n{said}")
            time.sleep(_POLL_S)
        return False

    def end(self) -> None:
        """Kill whatever is left of it."""
        tree = [self._process.pid, *{item["pid"] for item in self.events()}]
        left = []
        for pid in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if pid == self._process.pid or str(self.folder) in " ".join([*process.cmdline(), process.cwd()]):
                    left += [process, *process.children(recursive=True)]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        psutil.wait_procs(left, timeout=10)


def kill_once(job: Job, rank: int, chance: random.Random) -> dict[str, Any]:
    """Kill a rank some steps after a checkpoint, and return how the job came back."""
    if not job.until(job.settled, "its launcher has learned"):
        raise RuntimeError(f"the launcher of {job.contender.name} has learned nothing in {_PATIENCE_S:g} s")
    newest = max((item["step"] for item in job.events() if item["what"] == "step"), default=0)
    if not job.until(lambda: job.checkpoint_after(newest), "its first checkpoint"):
        raise RuntimeError(f"{job.contender.name} has no checkpoint after {_PATIENCE_S:g} s")
    time.sleep(chance.uniform(0.1, 0.8))
    pids = {item["rank"]: item["pid"] for item in job.events()}
    old = {item["pid"] for item in job.events()}
    victim = psutil.Process(pids[rank])
    killed_s, killed_at = time.monotonic(), time.time()
    victim.send_signal(signal.SIGKILL)
    gone_s: dict[int, float] = {}

    def back() -> bool:
        for pid in pids.values() - gone_s.keys():
            if not _alive(pid):
                gone_s[pid] = time.monotonic()
        new = [item for item in job.events() if item["pid"] not in old]
        stepped = {item["rank"] for item in new if item["what"] == "step"}
        return stepped == set(range(RANKS)) and len(gone_s) == RANKS

    if not job.until(back, "the ranks were back"):
        return {"recovered": False}
    new = [item for item in job.events() if item["pid"] not in old]
    last = {item["rank"]: item["pid"] for item in new}  # a first try may have failed

    def reached_s(what: str) -> float:
        return max(
            min(item["at_s"] for item in new if item["pid"] == pid and item["what"] == what) for pid in last.values()
        )

    at = [killed_s, max(gone_s.values())]
    at += [reached_s(what) for what in ("start", "main", "imported", "joined", "built", "restored", "step")]
    before = max(item["step"] for item in job.events() if item["what"] == "step" and item["pid"] in old)
    restored = max(item["step"] for item in new if item["what"] == "restored")
    result: dict[str, Any] = {"recovered": True, "total": at[-1] - killed_s, "lost steps": before - restored}
    result["phases"] = {name: end - begin for name, begin, end in zip(PHASES, at, at[1:], strict=False)}
    if job.contender.script == "ckptd":
        failed = [line for line in job.log() if line.get("event") == "generation failed"][-1]
        result["detect"] = datetime.fromisoformat(failed["timestamp"]).timestamp() - killed_at
    return result


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def memcpy_s(mib: int) -> float:
    """Return how long all ranks at once take to copy the state, into memory that is there."""
    code = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        f"a = torch.ones({mib} * 2**18); b = torch.zeros({mib} * 2**18)\n"
        "sys.stdin.read(1); t = []\n"
        "for _ in range(5): s = time.monotonic(); b.copy_(a); t.append(time.monotonic() - s)\n"
        "print(sorted(t)[2])"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(RANKS)]
    time.sleep(4.0)  # they import torch
    for process in processes:
        process.stdin.write("g")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    return max(float(process.communicate()[0]) for process in processes)


@contextlib.contextmanager
def running(contender: Contender, base: str | None, mib: int, device: str) -> Iterator[Job]:
    """Give a started job; nothing of it is left at the end."""
    folder = Path(tempfile.mkdtemp(prefix="ckptd-bench-", dir=base))
    job = Job(contender, folder, mib, device)
    try:
        yield job
    finally:
        job.end()
        shutil.rmtree(folder, ignore_errors=True)


def table(results: Mapping[str, Sequence[dict[str, Any]]]) -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"| contender | came back | total s | {' | '.join(PHASES)} | detect ms | lost steps |"
    yield "|---" * (len(PHASES) + 5) + "|"
    for name, runs in results.items():
        good = [run for run in runs if run["recovered"]]
        phases = [f"{statistics.median(run['phases'][phase] for run in good):.3f}" if good else "-" for phase in PHASES]
        detect = show(spread(run["detect"] for run in good if "detect" in run), 1000.0, 1)
        lost = show(spread(run["lost steps"] for run in good), digits=0)
        total = show(spread(run["total"] for run in good), digits=3)
        yield f"| {name} | {len(good)}/{len(runs)} | {total} | {' | '.join(phases)} | {detect} | {lost} |"


def verdicts(results: Mapping[str, Sequence[dict[str, Any]]], copy_s: float) -> Iterator[str]:
    """Yield what was promised, held against the figures."""

    def median(name: str) -> float | None:
        totals = [run["total"] for run in results.get(name, ()) if run["recovered"]]
        return statistics.median(totals) if totals else None

    yield f"memcpy of the state, all ranks at once: {copy_s:.3f} s"
    ours = median("ckptd")
    if ours is not None:
        bound_s = 0.5 + 1.3 * copy_s
        yield f"ckptd {ours:.3f} s <= 0.5 s + 1.3 x memcpy = {bound_s:.3f} s: {'yes' if ours <= bound_s else 'NO'}"
        detect_s = statistics.median(run["detect"] for run in results["ckptd"] if run["recovered"])
        yield f"detection {detect_s * 1000:.1f} ms <= 20 ms: {'yes' if detect_s <= 0.02 else 'NO'}"
    pairs = [("ckptd", "torchrun, fastest settings"), ("ckptd", "prefork supervisor, dcp.load")]
    pairs.append(("ckptd --preload torch,transformers", "torchrun, fastest, transformers"))
    for name, other in pairs:
        mine, theirs = median(name), median(other)
        if mine is not None and theirs is not None:
            bar = "" if "torchrun" not in other else f" <= 10 %: {'yes' if mine <= 0.1 * theirs else 'NO'}"
            yield f"{name} / {other}: {mine / theirs:.1%}{bar}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=100, help="the state of each rank: a model and its AdamW")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the state lies")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=2, help="in each start of a contender")
    parser.add_argument("--only", action="append", default=[], metavar="PART-OF-A-NAME")
    parser.add_argument("--dir", help="the disk for checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="everything measured")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    wanted = [item for item in CONTENDERS if not options.only or any(part in item.name for part in options.only)]
    left_out = [item for item in wanted if item.needs and find_spec(item.needs) is None]
    for item in left_out:
        print(f"left out: {item.name}, since {item.needs} is not installed")
    results: dict[str, list[dict[str, Any]]] = defaultdict(list)
    copies_s = []
    for number in range(options.rounds):
        copies_s.append(memcpy_s(options.mib))
        for contender in (item for item in wanted if item not in left_out):
            with running(contender, options.dir, options.mib, options.device) as job:
                for kill in range(options.kills):
                    results[contender.name].append(kill_once(job, (number + kill) % RANKS, chance))
                    print(f"... {contender.name}: {results[contender.name][-1]}", file=sys.stderr, flush=True)
                    if not results[contender.name][-1]["recovered"]:
                        break
    print(machine.line())
    print(*table(results), "", *verdicts(results, statistics.median(copies_s)), sep="\n")
    if options.json:
        Path(options.json).write_text(json.dumps({"results": results, "memcpy_s": copies_s}))


if __name__ == "__main__":
    main()
