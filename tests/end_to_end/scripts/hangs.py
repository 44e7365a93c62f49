"""Two ranks in lock-step without torch, one of which stalls: `hangs.py STEPS KIND STEP RANK`, in the first life alone.

KIND: those of `stalls`, none; or eval, a section that takes 4 s without any step, and undeclared, the same without
saying so, in every life.
"""

import os
import sys
import time

import ckptd
from tests.crash.state import advance, fresh
from tests.end_to_end.scripts.meeting import meet
from tests.end_to_end.scripts.stalls import stall

steps, kind, stuck_at, stuck = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rank = int(os.environ["RANK"])


def stop_for_long(run: ckptd.Run) -> None:
    """Do what takes long, or for ever."""
    if kind == "eval":
        with run.section("eval", deadline="20m"):
            time.sleep(4)
    elif kind == "undeclared":
        time.sleep(4)
    elif run.generation == 1:
        stall(kind)


state = fresh(rank)
with ckptd.attach(**state) as run:
    peer = meet(rank)
    for step in run.steps(steps):
        if step == stuck_at and rank == stuck:
            stop_for_long(run)
        advance(state, step)
        peer.sendall(b"x")
        assert peer.recv(1) == b"x", "the other rank is gone"
        time.sleep(0.02)
