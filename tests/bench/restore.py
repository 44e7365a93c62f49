"""One rank of ckptd that is restored, again and again: from memory after a kill, from disk in a new run."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tests.bench.contenders import Ckptd
from tests.bench.plan import Plan
from tests.bench.rank import Loop
from tests.bench.workload import Training

ORDERS = ("checkpoint", "twice", "endless", "memory", "disk")


class Rank:
    """A rank that notes how it was restored, and what each of its checkpoints should bring back."""

    def __init__(self, plan: Plan, *, prepared: bool) -> None:
        self.plan, self.rank = plan, int(os.environ["RANK"])
        self.notes = plan.place / f"restores{self.rank}"
        self.training = Training(self.rank, plan.shape, prepared=prepared)
        dist.barrier()
        begin_s = time.monotonic()
        self.contender = Ckptd(plan.place, self.rank, self.training)
        self._attach_s = time.monotonic() - begin_s
        self.loop = Loop(self.training)
        self.loop.contender = self.contender
        self._note()

    def _fingerprint(self, step: int) -> Path:
        return self.plan.place / f"fingerprint{self.rank}-{step}"

    def _note(self) -> None:
        restored = self.contender.run.restored
        if restored is None:
            return
        self.contender.number = restored.step
        place = self._fingerprint(restored.step)
        wanted = (place if place.exists() else self._fingerprint(0)).read_text()
        note = {
            "tier": restored.tier,
            "step": restored.step,
            "restore_s": restored.seconds,
            "attach_s": self._attach_s,
            "right": self.training.fingerprint() == wanted,
        }
        with self.notes.open("a") as file:
            file.write(json.dumps(note) + "\n")

    def change(self) -> str:
        """Change the state and note what it is now, for a checkpoint whose step nobody lives to learn."""
        self.loop.fresh("idle")
        now = self.training.fingerprint()
        self._fingerprint(0).write_text(now)
        return now

    def checkpoint(self) -> None:
        """Change the state, and see it durable."""
        now = self.change()
        self.loop.checkpoint("idle")
        self._fingerprint(self.contender.number).write_text(now)
        dist.barrier()

    @property
    def restores(self) -> int:
        """How often this rank has been restored."""
        return len(self.notes.read_text().splitlines()) if self.notes.exists() else 0


def main(plan: Plan, order: str, *, prepared: bool) -> None:
    """Note how this generation was restored, then do as ordered.

    `prepared`: the optimizer has its state before it is restored; most scripts leave that to the restore.
    """
    assert order in ORDERS, order
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // plan.ranks))
    dist.init_process_group("gloo")
    rank = Rank(plan, prepared=prepared)
    if order == "memory" and rank.restores < plan.repeats:
        rank.checkpoint()
        if rank.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # the agent ends it
    for _ in range({"checkpoint": 1, "twice": 2, "endless": 10**6}.get(order, 0)):
        rank.checkpoint()
    if order in ("checkpoint", "twice"):
        rank.change()  # else the last checkpoint, which closing takes, would refer to the bytes of the one before
    rank.contender.close()


if __name__ == "__main__":
    main(Plan.from_json(sys.argv[1]), sys.argv[2], prepared=sys.argv[3] == "prepared")
