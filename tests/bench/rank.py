"""One rank of one contender: measures stalls, slowdown and loads, and writes them as JSON. Started by `compare.py`."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.bench.contenders import CONTENDERS, Ckptd, Contender
from tests.bench.workload import Loops, change, make_state, size_bytes

QUIET_S = 1.0
PATIENCE_S = 300.0


def measure_idle(contender: Contender) -> dict[str, float]:
    """Take one checkpoint with nothing else to do: stall and time until durable."""
    dist.barrier()
    contender.request()
    end_s = time.monotonic() + PATIENCE_S
    while not contender.began:
        begin_s = time.monotonic()
        contender.boundary()
        stall_s = time.monotonic() - begin_s
        if not contender.began:
            time.sleep(0.01)
        assert time.monotonic() < end_s, "no boundary took the checkpoint"
    while not contender.durable():
        time.sleep(0.001)
        assert time.monotonic() < end_s, "the checkpoint did not become durable"
    return {"stall_s": stall_s, "durable_s": time.monotonic() - begin_s}


def measure_loop(contender: Contender, kind: str, loops: Loops) -> dict[str, float]:
    """Train beside one checkpoint: what it costs from the boundary that takes it until it is durable."""
    work = loops.of(kind)
    dist.barrier()
    quiet = _steps(contender, work, lambda begin_s: time.monotonic() - begin_s > QUIET_S)
    dist.barrier()
    contender.request()
    while not contender.began:
        work()
        contender.optimizer_step()
        begin_s = time.monotonic()
        contender.boundary()
        stall_s = time.monotonic() - begin_s
    busy = _steps(contender, work, lambda _: contender.durable())
    base_s = sorted(quiet)[len(quiet) // 2]
    return {
        "stall_s": stall_s,
        "lost_s": stall_s + sum(busy) - len(busy) * base_s,
        "longest_step_s": max(busy),
        "base_step_s": base_s,
        "longest_quiet_step_s": max(quiet),
    }


def _steps(contender: Contender, work: Any, over: Any) -> list[float]:
    times: list[float] = []
    begin_s = time.monotonic()
    while not over(begin_s) or not times:
        step_s = time.monotonic()
        work()
        contender.optimizer_step()
        contender.boundary()
        times.append(time.monotonic() - step_s)
    return times


def measure_load(contender: Contender, state: dict[str, torch.Tensor]) -> dict[str, float]:
    """Load the newest checkpoint from a cold cache into the state, after changing it."""
    _drop_cache(contender.path)
    before = {name: tensor.clone() for name, tensor in list(state.items())[:3]}
    change(state)
    dist.barrier()
    begin_s = time.monotonic()
    contender.load()
    took_s = time.monotonic() - begin_s
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items()), "it loaded something else"
    return {"load_s": took_s}


def _drop_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("contender")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size-mib", type=int, required=True)
    parser.add_argument("--tensors", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    state = make_state(rank, args.size_mib, args.tensors)
    contender = CONTENDERS[args.contender](args.folder, rank, state)
    loops = Loops()
    result: dict[str, Any] = {"pid": os.getpid(), "agent": os.getppid(), "state_bytes": size_bytes(state)}
    measure_idle(contender)  # the warm-up
    contender.forget()
    result["begin_s"] = time.monotonic()
    for kind in ("idle", "full", "waiting"):
        result[kind] = []
        for _ in range(args.repeats):
            measured = measure_idle(contender) if kind == "idle" else measure_loop(contender, kind, loops)
            result[kind].append(measured)
            result["written_bytes"] = contender.written_bytes()
            contender.forget()
    result["end_s"] = time.monotonic()
    if not isinstance(contender, Ckptd):  # ckptd loads when it attaches, in a process of its own
        measure_idle(contender)
        result["load"] = [measure_load(contender, state) for _ in range(args.repeats)]
    contender.close()
    (args.folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
