"""`ckptctl` with its file-system calls counted: by itself, or forked by a server that has everything imported.

    python -m tests.crash.agent CALLS ARGUMENTS...     CALLS as `calls.to_json` has it, "" for none
    python -m tests.crash.agent --serve                orders as lines of JSON in, pids and exit codes out

A forked agent runs the very function that the command `ckptctl` runs, with the environment, folder, output and clock
that its order names; it leaves the loop before, so that it ends as any program does.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import Any

from ckptd.cli.main import main as ckptctl
from tests.crash import calls


def run(counted: str, arguments: list[str]) -> int:
    """Run a verb in this process."""
    if counted:
        calls.install(counted)
    return ckptctl(arguments)


def serve() -> int:
    """Fork an agent for every order; in the child, return what to exit with."""
    import ckptd_plugins.detector_exit
    import ckptd_plugins.s3
    import ckptd_plugins.storage_local  # noqa: F401 - imported once, for all that are forked

    gc.collect()
    gc.freeze()
    while line := sys.stdin.buffer.raw.readline():  # type: ignore[attr-defined]
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(order)
            return run(order["calls"], order["arguments"])
        _answer({"pid": pid})
        _answer({"status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])})
    return 0


def _answer(answer: dict[str, int]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def _become(order: dict[str, Any]) -> None:
    os.setsid()
    now, later_s = time.time, order["later_s"]
    time.time = lambda: now() + later_s
    os.environ.clear()
    os.environ.update(order["environ"])
    os.chdir(order["folder"])
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, number)
    os.closerange(3, max(nothing, output) + 1)


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["--serve"] else run(sys.argv[1], sys.argv[2:]))
