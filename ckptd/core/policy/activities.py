"""What one rank is doing, told from its Python stack and from what the kernel says of its process.

A rank that waits for the others looks the same everywhere: asleep, inside a collective. All else is something of its
own, which the others may be waiting for. Which of them is to blame, `findings` says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

BUSY = 0.5
"""The share of the time from which on a thread computes rather than waits."""
_LIBRARY = re.compile(
    r"/(?:site|dist)-packages/|/lib/python3[.t\d]*/|^<|/ckptd_integrations/|/ckptd/(?:client|launcher)/"
)
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "torch/distributed/_functional_collectives.py")
_PLUMBING = ("wrapper", "inner", "decorator")
_DEVICE = ("torch/cuda/__init__.py", "torch/cuda/streams.py")
_DEVICE_TEXT = (".item()", ".cpu()", ".tolist()", ".synchronize(")
_LOADER = "/torch/utils/data/"
_LIBRARY_WAITS = (
    ("/threading.py", "waits for a lock or another thread"),
    ("/queue.py", "waits for a queue"),
    ("/concurrent/futures/", "waits for another thread"),
    ("/multiprocessing/", "waits for another process"),
    ("/subprocess.py", "waits for a program that it started"),
    ("/socket.py", "waits for the network"),
    ("/ssl.py", "waits for the network"),
)
_KERNEL_WAITS = (
    ("futex", None),
    ("nanosleep", "sleeps"),
    ("wait_woken", "waits for a socket"),
    ("pipe", "waits for a pipe"),
    ("do_wait", "waits for a child process"),
    ("poll", "waits for a socket or file"),
    ("select", "waits for a socket or file"),
    ("skb", "waits for a socket"),
    ("sk_", "waits for a socket"),
    ("accept", "waits for a connection"),
    ("unix_", "waits for a socket"),
    ("tcp_", "waits for a socket"),
    ("lock", "waits for a lock of a file"),
)


class Frame(NamedTuple):
    """One call of a Python stack."""

    function: str
    file: str
    line: int
    text: str = ""
    """The source of that line, where it can be read."""

    @property
    def place(self) -> str:
        """Where that is, in short."""
        text = f": {self.text}" if self.text else ""
        return f"{self.function} ({self.file.rpartition('/')[2]}:{self.line}{text})"


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of one rank."""

    rank: int
    pid: int
    state: str
    """The letter that the kernel has for its process; empty when there is none."""
    busy: float = 0.0
    """For which share of the time its main thread computed, or waited for a processor, while it was looked at."""
    wchan: str = ""
    """In which function of the kernel its main thread sleeps."""
    stack: tuple[Frame, ...] = ()
    """The Python stack of its main thread, innermost call first; empty when it could not be read."""
    holds_gil: bool = False
    step: int | None = None
    """Its last finished step; None when it has no control page."""


class Doing(StrEnum):
    """What sort of thing a rank does, the surest signs of a fault first."""

    GONE = "gone"
    STOPPED = "stopped"
    BLOCKED = "blocked"
    ELSEWHERE = "elsewhere"
    UNKNOWN = "unknown"
    WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class Activity:
    """What a rank is doing."""

    doing: Doing
    words: str
    """For people, to follow the rank's name."""
    awaits: str = ""
    """For a rank that waits for the others: in what, to be compared with theirs."""


def activity(look: Look) -> Activity:
    """Return what a rank is doing."""
    match look.state:
        case "":
            return Activity(Doing.GONE, "has ended")
        case "Z" | "X":
            return Activity(Doing.GONE, "has ended, and its parent has not taken note yet")
        case "T":
            return Activity(Doing.STOPPED, "is stopped by a signal (SIGSTOP or SIGTSTP)" + _at(look.stack))
        case "t":
            return Activity(Doing.STOPPED, "is held by a debugger" + _at(look.stack))
        case "D":
            where = f" ({look.wchan})" if look.wchan else ""
            words = f"is blocked inside the kernel{where}: a disk, a network filesystem or a device does not answer"
            return Activity(Doing.BLOCKED, words + _at(look.stack))
    if look.stack:
        return _waiting(look) or _elsewhere(look)
    return _without_stack(look)


def own_frame(stack: tuple[Frame, ...]) -> Frame | None:
    """Return the innermost call that is the user's own code and not a library's."""
    return next((frame for frame in stack if not _LIBRARY.search(frame.file)), None)


def _at(stack: tuple[Frame, ...]) -> str:
    frame = own_frame(stack) or (stack[0] if stack else None)
    return "" if frame is None else f", in {frame.place}"


def _waiting(look: Look) -> Activity | None:
    """Return the wait for other ranks, or for a device that may itself be waiting for them, that a stack shows."""
    library = []
    for frame in look.stack:
        if not _LIBRARY.search(frame.file):
            break
        library.append(frame)
    idle = look.busy < BUSY
    what = _collective(library, idle=idle)
    if what is None and idle and not library and ".wait(" in look.stack[0].text:
        what = "a collective that was begun before"
    if what is None and _on_device(look.stack[0], library):
        what = "its device"
    if what is None:
        return None
    own = own_frame(look.stack)
    place = "" if own is None else f" at {own.file.rpartition('/')[2]}:{own.line}"
    return Activity(Doing.WAITING, f"waits in {what}" + _at(look.stack), awaits=what + place)


def _collective(library: list[Frame], *, idle: bool) -> str | None:
    for frame in library:
        hidden = frame.function.startswith("_") or frame.function in _PLUMBING
        if frame.file.endswith(_COLLECTIVES) and not hidden:
            return frame.function
    if not idle:
        return None
    if any(frame.function == "_engine_run_backward" or "/torch/autograd/" in frame.file for frame in library):
        return "backward, where ranks exchange gradients"
    if any("/torch/nn/parallel/distributed.py" in frame.file for frame in library):
        return "DistributedDataParallel"
    if any("/torch/distributed/" in frame.file for frame in library):
        return "torch.distributed"
    return None


def _on_device(innermost: Frame, library: list[Frame]) -> bool:
    if library:
        return innermost.file.endswith(_DEVICE) and innermost.function in ("synchronize", "wait")
    return any(text in innermost.text for text in _DEVICE_TEXT)


def _elsewhere(look: Look) -> Activity:
    loader = next((frame for frame in look.stack if _LOADER in frame.file or not _LIBRARY.search(frame.file)), None)
    if look.busy >= BUSY:
        gil = ", and holds the GIL" if look.holds_gil else ""
        verb = f"is busy ({look.busy:.0%} of the time{gil})"
    elif loader is not None and _LOADER in loader.file:
        return Activity(Doing.ELSEWHERE, "waits for its data loader" + _at(look.stack))
    else:
        verb = _verb(look.stack[0], look.wchan)
    where = " inside its data loader" if any(_LOADER in frame.file for frame in look.stack) else ""
    return Activity(Doing.ELSEWHERE, verb + where + _at(look.stack))


def _kernel_wait(wchan: str) -> str | None:
    """Return what sleeping in that function of the kernel means; a futex may be anything."""
    return next((words for sign, words in _KERNEL_WAITS if sign in wchan), None)


def _verb(innermost: Frame, wchan: str) -> str:
    kernel = _kernel_wait(wchan)
    library = next((words for sign, words in _LIBRARY_WAITS if sign in innermost.file), None)
    if library is not None and kernel != "sleeps":
        return library
    if kernel is not None:
        return kernel
    lock = ".acquire(" in innermost.text or innermost.text.startswith("with ")
    return "waits for a lock" if lock else "does nothing"


def _without_stack(look: Look) -> Activity:
    if look.busy >= BUSY:
        return Activity(Doing.ELSEWHERE, f"is busy ({look.busy:.0%} of the time); its stack could not be read")
    if _kernel_wait(look.wchan) == "sleeps":
        return Activity(Doing.ELSEWHERE, "sleeps; its stack could not be read")
    asleep = f" in the kernel's {look.wchan}" if look.wchan not in ("", "0") else ""
    return Activity(Doing.UNKNOWN, f"waits for something{asleep}; its stack could not be read")
