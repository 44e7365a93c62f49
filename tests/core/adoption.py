"""How a job comes into the hands of another agent, for the scenarios of this folder."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from ckptd.core.adopt_events import HeldShard, RankReturned
from ckptd.core.handover import Handover
from ckptd.core.job import Now
from tests.core.script import Script, cid


def held(slot: int, checkpoint: str, *, final: bool = False, **witness: str) -> HeldShard:
    """Return what a rank says of a sealed slot."""
    return HeldShard(slot, cid(checkpoint), 4096, {"loss": 0.5}, 0.1, final, witness)


def take_over(before: Script, memory: tuple[tuple[int, int], ...] = (), **changes: Any) -> tuple[Script, list[str]]:
    """Let another agent take a job over, as it would from the journal; return it and what it wants done first."""
    handover = Handover.from_json(json.loads(json.dumps(before.machine.handover().to_json())))
    assert handover == before.machine.handover()
    spec = before.machine.spec
    after = Script(
        ranks=len(before.ranks), every_s=spec.every_s, supervised=spec.supervised, slots=spec.slots,
        further=spec.tiers[1:],
    )  # fmt: skip
    after.now_s, after.pids = before.now_s, dict(before.pids)
    handover = replace(handover, **changes)
    return after, after._show(after.machine.adopt(handover, Now(after.now_s, 1e9 + after.now_s), memory))


def back(
    job: Script,
    rank: int,
    step: int,
    *sealed: HeldShard,
    unknown: tuple[int, ...] = (),
    slots: tuple[int, ...] = (0, 1),
    stepped: bool = True,
) -> list[str]:
    """Let a rank come back."""
    return job.feed(RankReturned(rank, job.pids[rank], step, True, stepped, slots, sealed, unknown))
