"""The end of a process whose threads may still wait for an object store, or for a disk that hangs.

Event loop and interpreter join the threads of executors before they end, and one of them may be in a request that takes
as long as its timeout. Whoever ended the job gives it a grace, and kills it after that: its exit code, which says that
the job can be resumed, would be lost. What such a request leaves behind the next start goes on with.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

_PREFIX = "ckptd-"
"""How the names of all threads of ours begin: those of a program that this runs inside are none of its business."""
_WAIT_S = 0.5


class Unawaited(ThreadPoolExecutor):
    """An event loop's threads, for which it does not wait at its end; see `end_without_waiting`."""

    def __init__(self) -> None:
        super().__init__(thread_name_prefix=f"{_PREFIX}work")

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002 - as it is defined
        """Take no more work; who is at work goes on."""
        super().shutdown(wait=False, cancel_futures=cancel_futures)


def end_without_waiting(code: int) -> int:
    """Return `code` when no thread of ours is at work; else end this process with it now."""
    end_s = time.monotonic() + _WAIT_S
    ours = [thread for thread in threading.enumerate() if thread.name.startswith(_PREFIX) and not thread.daemon]
    for thread in ours:
        thread.join(max(0.0, end_s - time.monotonic()))
    if not any(thread.is_alive() for thread in ours):
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
