"""Ways in which a rank can stand still."""

import ctypes
import re
import time


def stall(kind: str) -> None:
    """Stand still: in a Python loop, in C that computes or sleeps and holds the GIL, or asleep."""
    if kind == "loop":
        while True:
            pass
    if kind == "gil":
        re.match("(a+)+$", "a" * 200 + "b")
    if kind == "pause":
        ctypes.PyDLL(None).pause()
    if kind == "sleep":
        time.sleep(10**6)
