"""The last step of a rank whose job is told to stop: when its shard is sealed it waits for the others', and leaves.

Nobody trains on while others leave: a collective would hang, or end with an error that means nothing. The wait is
bounded, since a rank that was past the step waits in its next one for those who are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ckptd.protocol.page import Word

_POLL_S = 0.001
_LOOK_EVERY_S = 0.5
_PATIENCE_MIN_S = 2.0
_PATIENCE_FACTOR = 10.0
"""Other ranks may take so much longer to capture than this one did."""


def wait_for_all(words: Sequence[int], took_s: float, look: Callable[[], object]) -> None:
    """Return when the rank may leave, when the step is not the last after all, or when that takes too long.

    `took_s` is how long the capture took; `look` is called now and then, and raises when the agent is gone.
    """
    step = words[Word.LAST_STEP]
    begin_s = time.monotonic()
    look_s = begin_s + _LOOK_EVERY_S
    end_s = begin_s + max(_PATIENCE_MIN_S, _PATIENCE_FACTOR * took_s)
    while not words[Word.LEAVE] and words[Word.LAST_STEP] == step:
        now_s = time.monotonic()
        if now_s >= end_s:
            return
        if now_s >= look_s:
            look_s = now_s + _LOOK_EVERY_S
            look()
        time.sleep(_POLL_S)
