"""What a job looks like from outside: the shape of `ckptctl status --json`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ckptd.core.job import JobMachine
from ckptd.core.patience import Patience
from ckptd.daemon.leaving import show_halt
from ckptd.daemon.ranks import Rank


def show(machine: JobMachine, ranks: Mapping[int, Rank]) -> dict[str, Any]:
    """Return the status of a job, from its machine and the ranks that have been admitted."""
    generation, last, now_s = machine.generation, machine.keeper.last_committed, time.monotonic()
    pids = {} if generation is None else generation.pids
    damaged = sorted(machine.keeper.tiers.damaged, key=lambda source: (source.id, source.tier))
    return {
        "job": machine.spec.job,
        "state": machine.state.value,
        "generation": 0 if generation is None else generation.number,
        "step": 0 if generation is None else generation.newest_step,
        "ranks": [
            {
                "rank": number,
                "pid": pids.get(number),
                "state": _state(machine, ranks, number),
                "step": ranks[number].step if number in ranks else None,
                "section": ranks[number].section if number in ranks else None,
            }
            for number in range(machine.spec.world_size)
        ],
        "last_committed": None if last is None else {"step": last.id.step, "tier": last.tier},
        "restarts": machine.recovery.restarts,
        "error": None if machine.error is None else str(machine.error),
        "hang": None if machine.patience is None else _hang(machine.patience, now_s),
        "warnings": [
            {"kind": item.kind, "rank": item.rank, "summary": item.summary, "since_s": round(now_s - item.since_s, 3)}
            for item in machine.warnings
        ],
        "halt": show_halt(machine),
        "numbers": machine.numbers_status(),
        "scrub": {
            "last_at": machine.scrubs.last_at,
            "checked": machine.scrubs.checked,
            "mended": machine.scrubs.mended,
            "damaged": [{**source.id._asdict(), "tier": source.tier} for source in damaged],
        },
    }


def _hang(patience: Patience, now_s: float) -> dict[str, Any]:
    """Return how long a step may take, why so long, and how long ago any rank was seen to finish one."""
    since_s = None if patience.stepped_s is None else round(now_s - patience.stepped_s, 3)
    return {"limit_s": round(patience.limit.seconds, 3), "rule": patience.limit.rule, "since_step_s": since_s}


def _state(machine: JobMachine, ranks: Mapping[int, Rank], number: int) -> str:
    generation = machine.generation
    if generation is not None and number in generation.gone:
        return "gone"
    if number in ranks:
        return ranks[number].phase
    return "spawned" if generation is not None and number in generation.pids else "absent"
