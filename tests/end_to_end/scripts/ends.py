"""Two ranks in lock-step without torch; in the first generation rank 1 ends at a step in the way that `--how` says.

`ends.py --how WAY [--at STEP] [--steps STEPS] [--cgroup FOLDER]`
"""

import argparse
import atexit
import ctypes
import os
import signal
import socket
import sys
import time

import ckptd
from tests.end_to_end.scripts.meeting import meet

parser = argparse.ArgumentParser()
parser.add_argument("--how", required=True)
parser.add_argument("--at", type=int, default=30)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--cgroup")
options = parser.parse_args()
rank = int(os.environ["RANK"])
data = bytearray(4096)


def eat() -> None:
    """Use memory until the kernel has had enough."""
    if options.cgroup:
        with open(os.path.join(options.cgroup, "cgroup.procs"), "w") as file:
            file.write(str(os.getpid()))
        time.sleep(2.5)  # for the agent to see where it is now, as it looks each second
    eaten = []
    while True:
        eaten.append(bytearray(os.urandom(4096)) * 256)


def end(peer: socket.socket) -> None:
    """End in the way that was asked for."""
    match options.how:
        case "oom":
            eat()
        case "segfault":
            ctypes.string_at(0)
        case "abort":
            os.abort()
        case "exit":
            sys.exit(3)
        case "raise":
            raise ValueError("loss is nan\nat layer 3")
        case "raise slowly" | "exit slowly":
            # The peer is let go of after the exception is told, and long before this process ends.
            atexit.register(lambda: (peer.shutdown(socket.SHUT_RDWR), time.sleep(60)))
            if options.how == "exit slowly":
                sys.exit(3)
            raise ValueError("loss is nan")
        case number:
            os.kill(os.getpid(), getattr(signal, number))


with ckptd.attach(data=data) as run:
    peer = meet(rank)
    for step in run.steps(options.steps):
        if rank == 1 and run.generation == 1 and step == options.at:
            end(peer)
        peer.sendall(b"x")
        if peer.recv(1) != b"x":
            raise ConnectionError("Connection closed by peer")
        time.sleep(0.01)
