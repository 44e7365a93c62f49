"""`make bench`: what a checkpoint costs, ckptd beside what a user would pick instead, on the same state in one run.

Contenders take turns, round by round, two ranks each. Prints one table and, with --json, everything measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench import limits
from tests.bench.contenders import CONTENDERS
from tests.bench.measure import Sampler, cpu_seconds, machine, other_cores, show, spread, table

ROOT = Path(__file__).parents[2]


def command(name: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """Return the arguments of `rank.py`."""
    return [
        str(ROOT / "tests/bench/rank.py"), name, str(folder),
        f"--size-mib={args.size_mib}", f"--tensors={args.tensors}", f"--repeats={args.repeats}",
    ]  # fmt: skip


def start(name: str, folder: Path, args: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    """Start a contender's ranks: ckptd's under `ckptctl run`, the others by hand, in the same environment."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    env["CKPTD_HOME"] = str(folder / "home")
    log = (folder / "log").open("wb")
    if name == "ckptd":
        options = ["--nproc=2", "--every=1h", "--name=bench", "--keep-last=1", f"--store={folder / 'store'}"]
        full = [sys.executable, "-m", "ckptd.cli.main", "run", *options, "--", *command(name, folder, args)]
        return [subprocess.Popen(full, env=env, stdout=log, stderr=log, cwd=ROOT)]
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29600 + os.getpid() % 300)}
        full = [sys.executable, *command(name, folder, args)]
        ranks.append(subprocess.Popen(full, env={**env, **place, **meet}, stdout=log, stderr=log, cwd=ROOT))
    return ranks


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one contender once; return its ranks' figures, memory, CPU and the noise meanwhile."""
    folder = Path(tempfile.mkdtemp(prefix="ckptd-bench-", dir=args.dir))
    try:
        before = machine()
        processes = start(name, folder, args)
        sampler = Sampler({"all": [process.pid for process in processes]})
        cpu_s = 0.0
        while any(process.poll() is None for process in processes):
            cpu_s = max(cpu_s, cpu_seconds([process.pid for process in processes]))
            try:
                processes[0].wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        sampler.close()
        if any(process.wait() for process in processes):
            raise SystemExit(f"{name} failed:\n{(folder / 'log').read_text()[-4000:]}")
        ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
        private, shared = sampler.extra_bytes("all", ranks[0]["begin_s"], ranks[0]["end_s"])
        return {
            "ranks": ranks, "extra_private_bytes": private, "extra_shared_bytes": shared, "cpu_s": cpu_s,
            "other_cores": other_cores(before, cpu_s),
        }  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def slowest(rounds: list[dict[str, Any]], kind: str, key: str) -> list[float]:
    """Return a figure of every repetition in every round: that of the slower rank."""
    return [
        max(pair)
        for each in rounds
        for pair in zip(*([item[key] for item in rank.get(kind, [])] for rank in each["ranks"]), strict=True)
    ]


def summarise(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a contender's row of the table, as spreads."""
    background = CONTENDERS[name].background
    load = slowest(rounds, "load", "load_s")
    state = rounds[0]["ranks"][0]["state_bytes"]
    return {
        "name": name,
        "stall_s": spread(slowest(rounds, "idle", "stall_s")),
        "durable_s": spread(slowest(rounds, "idle", "durable_s")),
        "lost_full_s": spread(slowest(rounds, "full", "lost_s")),
        "lost_waiting_s": spread(slowest(rounds, "waiting", "lost_s")),
        "longest_full": spread(_ratio(rounds, "full")) if background else None,
        "longest_waiting": spread(_ratio(rounds, "waiting")) if background else None,
        "load_s": spread(load) if load else None,
        "written": sum(rank["written_bytes"] for rank in rounds[0]["ranks"][:1]) / (2 * state),
        "extra_private": max(each["extra_private_bytes"] for each in rounds) / (2 * state),
        "cpu_s": spread([each["cpu_s"] for each in rounds]),
        "other_cores": spread([each["other_cores"] for each in rounds]),
    }


def _ratio(rounds: list[dict[str, Any]], kind: str) -> list[float]:
    longest, base = slowest(rounds, kind, "longest_step_s"), slowest(rounds, kind, "base_step_s")
    return [one / other for one, other in zip(longest, base, strict=True)]


def row(item: dict[str, Any], best: dict[str, Any]) -> dict[str, str]:
    """Return a printed row; `x` columns are ratios to ckptd's medians."""
    times = {key: item[key]["median"] / best[key]["median"] for key in ("stall_s", "durable_s")}
    return {
        "contender": item["name"],
        "stall ms": show(item["stall_s"], 1e3, 0),
        "x": f"{times['stall_s']:.2f}",
        "durable s": show(item["durable_s"]),
        "x ": f"{times['durable_s']:.2f}",
        "lost, full loop ms": show(item["lost_full_s"], 1e3, 0),
        "lost, waiting loop ms": show(item["lost_waiting_s"], 1e3, 0),
        "longest step x": show(item["longest_waiting"], 1, 1),
        "load s": show(item["load_s"]),
        "written": f"{item['written']:.2f}",
        "extra memory": f"{item['extra_private']:.2f}",
        "noise": f"{item['other_cores']['median']:.2f}",
    }


def limit_row(name: str, size: int, seconds: list[float]) -> dict[str, str]:
    """Return a printed row of what the machine allows."""
    rate = size / spread(seconds)["median"] / 1e9
    return {"limit, both ranks at once": name, "s": show(spread(seconds)), "GB/s": f"{rate:.2f}"}


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--size-mib", type=int, default=512, help="state per rank (default 512)")
    parser.add_argument("--tensors", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=5, help="per round, after a warm-up (default 5)")
    parser.add_argument("--rounds", type=int, default=1, help="turns of every contender (default 1)")
    parser.add_argument("--only", action="append", help="contenders whose name contains this")
    parser.add_argument("--dir", default=None, help="the disk to write to (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args()
    names = [name for name in CONTENDERS if not args.only or any(part in name for part in args.only)]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names:
            print(f"... round {number + 1}: {name}", file=sys.stderr, flush=True)
            rounds[name].append(measure(name, args))
    items = [summarise(name, rounds[name]) for name in names]
    best = next((item for item in items if item["name"] == "ckptd"), items[0])
    print(table([row(item, best) for item in items]))
    state = rounds[names[0]][0]["ranks"][0]["state_bytes"]
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        found = limits.measure(state // 4096 * 4096, Path(folder), args.repeats)
    print()
    print(table([limit_row(name, 2 * state, seconds) for name, seconds in found.items()]))
    if args.json:
        args.json.write_text(json.dumps({"contenders": items, "limits": found, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
