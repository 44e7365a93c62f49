"""The job of the crash matrix: `train.py STEPS PAUSE_S`, two ranks in lock-step, no torch.

Each rank leaves the digests of its end state in `end-<rank>.json` of the working directory.
"""

import json
import os
import sys
import time
from pathlib import Path

import ckptd
from tests.crash.state import advance, digests, fresh
from tests.end_to_end.scripts.meeting import meet

steps, pause_s = int(sys.argv[1]), float(sys.argv[2])
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


state = fresh(rank)
with ckptd.attach(**state, seen=0) as run:
    print(f"generation {run.generation} restored {run.restored and (run.restored.step, run.restored.tier)}", flush=True)
    peer = meet(rank) if world > 1 else None
    for step in run.steps(steps):
        advance(state, step)
        run.state["seen"] += 1
        if peer is not None:
            peer.sendall(b"x")
            assert peer.recv(1) == b"x", "the other rank is gone"
        time.sleep(pause_s)
    assert run.state["seen"] == steps, run.state["seen"]
Path(f"end-{rank}.json").write_text(json.dumps(digests(state)))
