"""The job of the crash matrix: `train.py STEPS PAUSE_S`, two ranks in lock-step, no torch.

Each rank leaves the digests of its end state in `end-<rank>.json` of the working directory.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

import ckptd
from tests.crash.state import advance, digests, fresh

steps, pause_s = int(sys.argv[1]), float(sys.argv[2])
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def meet() -> socket.socket:
    """Connect the two ranks: what a collective does to real ones, this does to these."""
    place = ("127.0.0.1", int(os.environ["MASTER_PORT"]))
    if rank == 0:
        with socket.create_server(place) as server:
            return server.accept()[0]
    while True:
        try:
            return socket.create_connection(place)
        except ConnectionRefusedError:
            time.sleep(0.002)


state = fresh(rank)
with ckptd.attach(**state, seen=0) as run:
    print(f"generation {run.generation} restored {run.restored and (run.restored.step, run.restored.tier)}", flush=True)
    peer = meet() if world > 1 else None
    for step in run.steps(steps):
        advance(state, step)
        run.state["seen"] += 1
        if peer is not None:
            peer.sendall(b"x")
            assert peer.recv(1) == b"x", "the other rank is gone"
        time.sleep(pause_s)
    assert run.state["seen"] == steps, run.state["seen"]
Path(f"end-{rank}.json").write_text(json.dumps(digests(state)))
