"""One rank of one contender: goes through the phases of its plan and writes what it measured as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.bench import probes
from tests.bench.background import Writer
from tests.bench.contenders import CONTENDERS, Contender, Loading
from tests.bench.measure import Step, cost
from tests.bench.peers import PEERS
from tests.bench.plan import Plan
from tests.bench.workload import Training

PATIENCE_S = 300.0
IDLE_WATCH_S = 20.0


class Loop:
    """Training steps in lock-step with the other ranks, each timed."""

    contender: Contender
    """Comes after the first of the hooks, and so after the loop."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.durable_at_s = 0.0
        self._wait_s = 0.0
        self._hooked_s = 0.0
        self._agreed = torch.zeros(1)

    def hook_before(self, *_: Any) -> None:
        """The first of all hooks before an optimizer's step."""
        self._hooked_s = time.monotonic()

    def hook_after(self, *_: Any) -> None:
        """The last of them: whatever lies between is a wait for the contender."""
        self._wait_s += time.monotonic() - self._hooked_s

    def _all(self, mine: bool) -> bool:
        """Whether all ranks say so; also what keeps them in step, as the sum of gradients does."""
        self._agreed[0] = float(mine)
        dist.all_reduce(self._agreed, dist.ReduceOp.MIN)
        return bool(self._agreed.item())

    def run(self, kind: str, over: Callable[[], bool]) -> list[Step]:
        """Train until all ranks say that it is over; the last step, in which they find out, is left out."""
        steps: list[Step] = []
        end_s = time.monotonic() + PATIENCE_S
        done = False
        while not done:
            begin_s = time.monotonic()
            assert begin_s < end_s, f"{kind}: no durable checkpoint in {PATIENCE_S:g} s"
            mine = over()
            self.training.work(kind)
            done = self._all(mine)
            self._wait_s = 0.0
            self.training.optimize(kind)
            boundary_s = time.monotonic()
            self.contender.boundary()
            now_s = time.monotonic()
            steps.append(Step(self.contender.boundaries, begin_s, now_s - begin_s, now_s - boundary_s, self._wait_s))
        return steps[:-1]

    def quiet(self, kind: str, seconds: float) -> list[Step]:
        """Train without a checkpoint."""
        end_s = time.monotonic() + seconds
        return self.run(kind, lambda: time.monotonic() > end_s)

    def checkpoint(self, kind: str) -> list[Step]:
        """Train beside one checkpoint, asked for now, until it is durable."""
        self.durable_at_s = 0.0

        def durable() -> bool:
            if not self.durable_at_s and self.contender.durable():
                self.durable_at_s = time.monotonic()
            return self.durable_at_s > 0

        dist.barrier()
        self.contender.request()
        return self.run(kind, durable)

    def fresh(self, kind: str) -> None:
        """Change all of the state, so that nothing equals what an earlier checkpoint has, and get ready."""
        self.training.prepare("full")
        self.training.change()
        self.training.prepare(kind)
        self.training.synchronize()
        dist.barrier()


def measure_idle(loop: Loop) -> dict[str, float]:
    """One checkpoint with next to nothing else to do: stall, time until durable and CPU of either side."""
    contender = loop.contender
    loop.fresh("idle")
    rates = _cpu(contender)
    quiet_begin_s = time.monotonic()
    loop.quiet("idle", 0.3)
    quiet_s = time.monotonic() - quiet_begin_s
    begin, begin_s = _cpu(contender), time.monotonic()
    steps = loop.checkpoint("idle")
    written = contender.written_bytes()
    contender.forget()
    used_s = time.monotonic() - begin_s
    end = _cpu(contender)
    taken = next(step for step in steps if step.boundary == contender.taken)
    polled_s = used_s - taken.stall_s
    polling = [polled_s * (after - before) / quiet_s for before, after in zip(rates, begin, strict=True)]
    own_s, beside_s = (max(0.0, b - a - p) for a, b, p in zip(begin, end, polling, strict=True))
    return {
        "stall_s": taken.stall_s,
        "durable_s": loop.durable_at_s - (taken.begin_s + taken.total_s - taken.stall_s),
        "rank_cpu_s": own_s,
        "beside_cpu_s": beside_s,
        "written_bytes": written,
    }


def _cpu(contender: Contender) -> tuple[float, float]:
    return time.process_time(), probes.cpu_total_s(contender.helpers())


def measure_loop(loop: Loop, kind: str, quiet_s: float) -> dict[str, float]:
    """One checkpoint beside a training loop: what it costs from its boundary until it is durable."""
    loop.fresh(kind)
    loop.run(kind, _after(2))
    quiet = loop.quiet(kind, quiet_s)
    beside = loop.checkpoint(kind)
    loop.contender.forget()
    return cost(quiet, beside, loop.contender.taken)._asdict()


def _after(calls: int) -> Callable[[], bool]:
    left = iter(range(calls))
    return lambda: next(left, None) is None


def measure_memory(loop: Loop, before: probes.Memory) -> dict[str, float]:
    """Peak memory over two checkpoints, above what the rank had before there was a contender."""
    with probes.Watch(loop.contender.helpers) as watch:
        for _ in range(2):
            loop.fresh("waiting")
            loop.checkpoint("waiting")
            loop.contender.forget()
    return {
        "private_bytes": watch.own.private_bytes - before.private_bytes,
        "shared_bytes": watch.own.shared_bytes - before.shared_bytes,
        "beside_private_bytes": watch.beside_private_bytes,
        "agent_bytes": watch.agent_bytes,
    }


def measure_load(loop: Loop, *, cold: bool) -> dict[str, float]:
    """Load the newest checkpoint in place, after changing the state; proves that it is what was checkpointed."""
    contender, training = loop.contender, loop.training
    assert isinstance(contender, Loading), f"{contender.name} does not load"
    wanted = training.fingerprint()
    training.change()
    training.synchronize()
    if cold:
        probes.drop_cache(path for path in contender.path.rglob("*") if path.is_file())
    dist.barrier()
    begin_s = time.monotonic()
    contender.load()
    training.synchronize()
    took_s = time.monotonic() - begin_s
    assert training.fingerprint() == wanted, "it loaded something else"
    dist.barrier()
    return {"load_s": took_s}


def measure_watch(loop: Loop) -> dict[str, float]:
    """Train with nothing due: CPU and memory of the agent meanwhile."""
    dist.barrier()  # while the agent clears slots for a rank that comes later, it is not idle
    begin, begin_s = _cpu(loop.contender)[1], time.monotonic()
    with probes.Watch(loop.contender.helpers) as watch:
        loop.quiet("waiting", IDLE_WATCH_S)
    cpu = (_cpu(loop.contender)[1] - begin) / (time.monotonic() - begin_s)
    return {"agent_cpu_cores": cpu, "agent_bytes": watch.agent_bytes}


def _phase(loop: Loop, plan: Plan, kind: str) -> list[dict[str, float]]:
    contender, repeats = loop.contender, plan.repeats
    if kind == "idle":
        if "memory" not in plan.phases:
            measure_idle(loop)  # the warm-up
        return [measure_idle(loop) for _ in range(repeats)]
    if kind in ("full", "waiting"):
        for _ in range(contender.warm_ups):
            loop.fresh(kind)
            loop.checkpoint(kind)
            contender.forget()
        return [measure_loop(loop, kind, plan.quiet_s) for _ in range(repeats)]
    if kind == "watch":
        return [measure_watch(loop)]
    if kind == "writer":
        found = []
        for _ in range(repeats):
            quiet = measure_idle(loop)
            with Writer(plan.place, active=contender.rank == 0):
                beside = measure_idle(loop)
            found.append({"quiet_s": quiet["durable_s"], "beside_s": beside["durable_s"]})
        return found
    assert kind in ("load cold", "load warm"), kind
    loop.fresh("idle")
    loop.checkpoint("idle")
    measure_load(loop, cold=False)
    found = [measure_load(loop, cold=kind == "load cold") for _ in range(repeats)]
    contender.forget()
    return found


def measure(plan: Plan) -> None:
    """Do what the plan says."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // plan.ranks))
    dist.init_process_group("gloo")
    training = Training(rank, plan.shape)
    for kind in ("full", "waiting"):
        training.prepare(kind)
        training.work(kind)
        training.optimize(kind)
    probes.trim()
    before = probes.memory(os.getpid())
    loop = Loop(training)
    register_optimizer_step_pre_hook(loop.hook_before)
    loop.contender = {**CONTENDERS, **PEERS}[plan.contender](plan.place, rank, training)
    if training.optimizer is not None:
        training.optimizer.register_step_pre_hook(loop.hook_after)
    result: dict[str, Any] = {"state_bytes": training.state_bytes()}
    if training.on_device:
        result["copy_out_s"] = training.copy_out_s()
    for kind in plan.phases:
        if kind == "memory":
            result[kind] = measure_memory(loop, before)
        else:
            result[kind] = _phase(loop, plan, kind)
    loop.contender.close()
    (plan.place / f"rank{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    measure(Plan.from_json(sys.argv[1]))
