"""How a rank's uncaught exception is shown to people and told to the agent.

The interpreter prints it, as it would for a fresh process: nothing here formats what the user sees, but for the
one line that a `CkptdError` is. The agent gets the same as text, over the socket that the rank's environment names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from types import CodeType, TracebackType

from ckptd.errors import CkptdError
from ckptd.protocol.channel import open_channel
from ckptd.protocol.failure import describe_end
from ckptd.protocol.messages import Raised

_DEADLINE_S = 2.0

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


def show_below(code: CodeType) -> None:
    """Let the interpreter print the exception that is on its way up, without the launcher's own frames.

    The exception itself goes on to the interpreter, which knows best what follows: `sys.last_value`, the exit code,
    a user's `sys.excepthook`, the signal that ends a process after KeyboardInterrupt. Only the frames down to `code`
    are taken from the traceback, in a hook that removes itself.
    """
    theirs: Hook = getattr(sys, "excepthook", sys.__excepthook__)

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.excepthook = theirs
        trace = _below(trace, code)
        error.__traceback__ = sys.last_traceback = trace
        try:
            theirs(kind, error, trace)
        finally:
            # Told after it was printed: the agent may kill this process as soon as it knows.
            if isinstance(error, Exception):
                tell(error)

    sys.excepthook = show


def show_refusal(error: CkptdError) -> None:
    """Print the one line of an error of ours, and its hint: it is a refusal, and a traceback would only bury it."""
    lines = [f"ckptd: error: {error.message}"]
    if error.hint:
        lines.append(f"hint: {error.hint}")
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            sys.stderr.write("\n".join(lines) + "\n")
            sys.stderr.flush()


def tell(error: BaseException) -> None:
    """Send an exception to the agent; whoever can't be told is not told, since the exit matters more."""
    environ = os.environ
    path, job = environ.get("CKPTD_SOCKET"), environ.get("CKPTD_JOB")
    rank, generation = environ.get("RANK", ""), environ.get("CKPTD_GENERATION", "")
    if not path or not job or not rank.isdecimal() or not generation.isdecimal():
        return
    message = Raised(job=job, rank=int(rank), generation=int(generation), exception=describe_end(error).to_json())
    with suppress(OSError, CkptdError):
        channel, _ = open_channel(path, role="rank", deadline_s=_DEADLINE_S)
        try:
            channel.send(message, _DEADLINE_S)
        finally:
            channel.close()


def _below(trace: TracebackType | None, code: CodeType) -> TracebackType | None:
    while trace is not None:
        found, trace = trace.tb_frame.f_code is code, trace.tb_next
        if found:
            break
    return trace
