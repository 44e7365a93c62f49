"""What is on its way from the first tier to a further one: newest first, one at a time, and never a long queue."""

from __future__ import annotations

from ckptd.types import CheckpointId

FINAL_UPLOAD_TRIES = 4
"""After so many failures of the newest checkpoint an ending job stops waiting for it."""
_RETRY_BASE_S = 0.5
_RETRY_MAX_S = 60.0
_DOUBLINGS_MAX = 10


class Uploads:
    """The queue of one further tier.

    The newest goes first, because it is what a restart wants. Whoever waits behind it is bounded: a tier that is too
    slow for the pace of commits gets fewer of them, and not ever older ones. Delays grow with the failures in a row of
    the tier, whichever checkpoint they hit, so that a tier that is down is not asked again with every commit.
    """

    def __init__(self, tier: str, backlog: int = 2, every_s: float = 0.0) -> None:
        self.tier = tier
        self.backlog = max(1, backlog)
        self.every_s = every_s
        self.closed = False
        """Somebody else owns the job there: it gets nothing more from us."""
        self._waiting: list[CheckpointId] = []
        """Newest first."""
        self._running: CheckpointId | None = None
        self._owed: CheckpointId | None = None
        """The newest of all that were offered, until it is there."""
        self._failures: dict[CheckpointId, int] = {}
        self._failures_in_a_row = 0
        self._lost: CheckpointId | None = None
        """The one that is owed, once another try is no use."""
        self._unwanted: CheckpointId | None = None
        """The one under way, once it is not in the lineage any more."""
        self._due_at_s = 0.0
        self._retry_at_s = 0.0
        self._hurried = False
        self._awaits_last = False

    def offer(self, checkpoint: CheckpointId) -> list[CheckpointId]:
        """Queue a checkpoint that was committed on the first tier; return those that are not uploaded because of it."""
        if checkpoint in self.pinned:
            return []
        self._owed = checkpoint if self._owed is None else max(self._owed, checkpoint)
        if self._lost == checkpoint:
            self._lost = None
        if self.closed:
            return []
        replaced = [item for item in self._waiting if item in self._failures and item < checkpoint]
        self._waiting = sorted({checkpoint, *self._waiting}.difference(replaced), reverse=True)
        return replaced + self.trim()

    def trim(self) -> list[CheckpointId]:
        """Let go of those that wait beyond the bound, the oldest; return them."""
        room = 1 if self.every_s else self.backlog  # the others would not have their turn before newer ones come
        over, self._waiting = self._waiting[room:], self._waiting[:room]
        for item in over:
            self._failures.pop(item, None)
        return over

    def next(self, now_s: float) -> CheckpointId | None:
        """Return what should be uploaded now, if anything."""
        due = now_s >= self._retry_at_s and (self._hurried or now_s >= self._due_at_s) and not self._awaits_last
        return self._waiting[0] if due and self._waiting and self._running is None else None

    def begun(self, checkpoint: CheckpointId, now_s: float) -> None:
        """Note that an upload is under way."""
        self._waiting.remove(checkpoint)
        self._running, self._unwanted = checkpoint, None
        self._due_at_s = now_s + self.every_s

    def done(self, checkpoint: CheckpointId) -> None:
        """Note that a checkpoint is committed there."""
        self._running = None
        self._failures_in_a_row = 0
        self._retry_at_s = 0.0
        self._settle(checkpoint)

    def skip(self, checkpoint: CheckpointId) -> None:
        """Do without the upload of a checkpoint that waits: it would not be kept."""
        self._waiting.remove(checkpoint)
        self._settle(checkpoint)

    def _settle(self, checkpoint: CheckpointId) -> None:
        self._failures.pop(checkpoint, None)
        if self._owed == checkpoint:
            self._owed = None

    def failed(self, checkpoint: CheckpointId, now_s: float, *, retryable: bool) -> float | None:
        """Note a failure; return after how long it is tried again, None when it is not.

        It is not when a newer one waits, which takes its place, nor when another try would be no use. When it is,
        `trim` says which it leaves no room for.
        """
        self._running = None
        self._failures_in_a_row += 1
        delay_s = min(_RETRY_MAX_S, _RETRY_BASE_S * 2.0 ** min(self._failures_in_a_row, _DOUBLINGS_MAX))
        self._retry_at_s = now_s + delay_s
        self._due_at_s = now_s  # nothing has come of it: the next need not wait its interval
        if not retryable and checkpoint == self._owed:
            self._lost = checkpoint
        unwanted = checkpoint == self._unwanted or any(item > checkpoint for item in self._waiting)
        if not retryable or self.closed or unwanted:
            self._failures.pop(checkpoint, None)
            return None
        self._failures[checkpoint] = self._failures.get(checkpoint, 0) + 1
        self._waiting = [checkpoint, *self._waiting]
        return delay_s

    def close(self) -> None:
        """Give the tier up: a newer agent has claimed the job there."""
        self.closed = True
        self._waiting = []

    def leave_behind(self, parent: CheckpointId) -> None:
        """Forget what is newer than that with which a new generation begins: it is not in the lineage any more."""
        self._waiting = [item for item in self._waiting if item <= parent]
        self._failures = {item: count for item, count in self._failures.items() if item <= parent}
        if self._running is not None and self._running > parent:
            self._unwanted = self._running
        if self._owed is not None and self._owed > parent:
            self._owed = max((item for item in self.pinned if item <= parent), default=None)

    def hurry(self, now_s: float) -> None:
        """Let the last one go at once, interval or delay: the job is ending."""
        self._awaits_last = False
        if not self._hurried:
            self._hurried = True
            self._retry_at_s = min(self._retry_at_s, now_s)

    def await_last(self) -> None:
        """Begin nothing until `hurry`, so that the job's last checkpoint finds the way free."""
        self._awaits_last = True

    def calm_down(self) -> None:
        """Keep to the interval again: the job goes on after all."""
        self._hurried = self._awaits_last = False

    @property
    def pinned(self) -> frozenset[CheckpointId]:
        """What must stay on the first tier, to be read from there."""
        running = () if self._running is None else (self._running,)
        return frozenset((*self._waiting, *running))

    @property
    def owed(self) -> CheckpointId | None:
        """The newest of all that were offered, while it is not there."""
        return self._owed

    @property
    def busy(self) -> bool:
        """Whether an upload is under way."""
        return self._running is not None

    @property
    def pending(self) -> bool:
        """Whether the newest checkpoint is not there yet, and may still come."""
        return self._owed is not None and not self.hopeless

    @property
    def hopeless(self) -> bool:
        """Whether the newest checkpoint will not come, or failed so often that an ending job stops waiting for it."""
        owed = self._owed
        if owed is None:
            return False
        return self.closed or self._lost == owed or self._failures.get(owed, 0) >= FINAL_UPLOAD_TRIES
