"""Real processes that do the same thing at the same moment, for contracts that must hold between processes."""

from __future__ import annotations

import subprocess
import sys

_PRELUDE = """\
import sys
def ready():
    print("ready", flush=True)
    sys.stdin.readline()
"""


def race(code: str, count: int, *arguments: str, deadline_s: float = 60.0) -> list[str]:
    """Run `code` in `count` Python processes at once and return what each printed, without the last newline.

    Each process has its number and `arguments` as `sys.argv[1:]`. The code does its imports, calls `ready()`, which
    returns at the same moment in all of them, and then does what is to be raced. Raises `AssertionError` with the
    traceback of a process that fails, and leaves no process behind.
    """
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _PRELUDE + code, str(number), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            racer.stdout.readline()
        for racer in racers:
            assert racer.stdin is not None
            if racer.poll() is None:
                racer.stdin.write("go\n")
                racer.stdin.flush()
        ends = [(racer.communicate(timeout=deadline_s), racer.returncode) for racer in racers]
    finally:
        for racer in racers:
            if racer.poll() is None:
                racer.kill()
                racer.communicate()
    for (_, problem), returncode in ends:
        assert returncode == 0, f"a racing process ended with {returncode}:\n{problem}"
    return [said.removesuffix("\n") for (said, _), _ in ends]
