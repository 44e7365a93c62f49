"""The least that a supervisor can be: torch imported once, ranks forked from that, all of them killed when one dies.

`prefork.py RANKS SCRIPT ARGUMENTS…`: no checkpoints of its own, no detection but `wait`, and a job that hangs hangs.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys

import torch.distributed.checkpoint  # noqa: F401 - what every rank needs


def start(ranks: int, command: list[str]) -> dict[int, int]:
    """Fork the ranks, with a rendezvous of their own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    pids = {}
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
            os._exit(0)
        pids[pid] = rank
    return pids


def main(ranks: int, command: list[str]) -> None:
    """Keep the ranks going until one ends well."""
    while True:
        pids = start(ranks, command)
        ended, status = os.wait()
        for pid in pids.keys() - {ended}:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if status == 0:
            return


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
