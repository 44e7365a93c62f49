"""The job of these tests: `steps.py STEPS PAUSE_S`, ranks in lock-step, no torch.

For each step that it has finished a rank adds a line "GENERATION STEP" to `steps-<rank>.log` of the working directory.
"""

import os
import socket
import sys
import time

import ckptd

steps, pause_s = int(sys.argv[1]), float(sys.argv[2])
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
log = os.open(f"steps-{rank}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


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


state = {"data": bytearray(200_000)}
with ckptd.attach(**state, seen=0) as run:
    peer = meet() if world > 1 else None
    for step in run.steps(steps):
        state["data"][:8] = step.to_bytes(8, "big")
        run.state["seen"] += 1
        assert run.state["seen"] == step, (run.state["seen"], step)
        if peer is not None:
            peer.sendall(b"x")
            assert peer.recv(1) == b"x", "the other rank is gone"
        os.write(log, f"{run.generation} {step}\n".encode())
        time.sleep(pause_s)
