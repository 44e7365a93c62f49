"""A tier that tries again: what a store refuses for a moment doesn't reach those who call it."""

from __future__ import annotations

import random as randomness
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ckptd.errors import CkptdError, FencedError, NotFoundError, invariant
from ckptd.storage.stream import Stream, piece, stream_of
from ckptd.storage.tier import Data, Pace, Tier
from ckptd.storage.wrappers.forwarding import ForwardingTier

Result = TypeVar("Result")

Report = Callable[[str, int, float, CkptdError], None]
"""Told of each retry: what is tried again, which attempt has failed (from 1), the seconds until the next, and why."""

_COMPARED_BYTES = 4 * 2**20
_MAX_DOUBLINGS = 60


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long a call is tried again."""

    first_delay_s: float = 0.1
    """The delay after the first failure is below this; with each further one the bound doubles."""
    max_delay_s: float = 10.0
    deadline_s: float = 60.0
    """No attempt begins later than this after the call did. It ends no attempt: bounding one is the tier's timeout."""
    max_attempts: int = 20

    def __post_init__(self) -> None:
        invariant(0 < self.first_delay_s <= self.max_delay_s, "a delay of nothing is no backoff")
        invariant(self.deadline_s >= 0 and self.max_attempts >= 1, "a call is made at least once")


def next_delay(attempt: int, elapsed_s: float, policy: RetryPolicy, rng: Callable[[], float]) -> float | None:
    """Return how long to wait after attempt number `attempt` (from 1) has failed, None to give up.

    Anything from nothing to the bound is as likely ("full jitter"), so that many agents which one outage stopped at
    the same moment do not all come back at the same moment. `rng` returns numbers from 0 up to 1.
    """
    if attempt >= policy.max_attempts:
        return None
    bound_s = min(policy.max_delay_s, policy.first_delay_s * 2.0 ** min(attempt - 1, _MAX_DOUBLINGS))
    delay_s = rng() * bound_s
    return delay_s if elapsed_s + delay_s <= policy.deadline_s else None


class Retrier:
    """Makes a call again when its error says that this may help (`retryable`); any thread may ask.

    What is not there, damaged, refused or fenced is raised at once: no retry changes it. `close` ends the waiting of
    other threads; their calls raise the error that they were waiting for to pass.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        sleep: Callable[[float], object] | None = None,
        random: Callable[[], float] = randomness.random,
        clock: Callable[[], float] = time.monotonic,
        report: Report | None = None,
    ) -> None:
        self._policy = policy
        self._closing = threading.Event()
        self._sleep = sleep or self._closing.wait
        self._random = random
        self._clock = clock
        self._report = report

    def call(self, what: str, act: Callable[[], Result]) -> Result:
        """Return what `act` returns, at the first attempt that does not fail in passing."""
        begin_s, attempt = self._clock(), 1
        while True:
            try:
                return act()
            except CkptdError as error:
                if not error.retryable or self._closing.is_set():
                    raise
                delay_s = next_delay(attempt, self._clock() - begin_s, self._policy, self._random)
                if delay_s is None:
                    raise
                if self._report is not None:
                    self._report(what, attempt, delay_s, error)
                self._sleep(delay_s)
                if self._closing.is_set():
                    raise
            attempt += 1

    def close(self) -> None:
        """End all waiting; no call is made again from now on."""
        self._closing.set()


class RetryingTier(ForwardingTier):
    """A tier whose calls are made again as `Retrier` says."""

    def __init__(
        self,
        tier: Tier,
        policy: RetryPolicy | None = None,
        *,
        sleep: Callable[[float], object] | None = None,
        random: Callable[[], float] = randomness.random,
        clock: Callable[[], float] = time.monotonic,
        report: Report | None = None,
    ) -> None:
        super().__init__(tier)
        self._retrier = Retrier(policy or RetryPolicy(), sleep=sleep, random=random, clock=clock, report=report)

    def _call(self, operation: str, key: str, act: Callable[[], Result]) -> Result:
        return self._retrier.call(f"{operation} {key}".rstrip(), act)

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Keep `data` under `key`; `pace` is asked again for what is sent again.

        An attempt that failed may have put the object all the same, its answer lost on the way. With `create_only`
        the next one is fenced then, by ourselves: the object is read back, and the put has succeeded if it is ours
        byte for byte. So what is put create-only has to name who puts it, where two may put the same.
        """
        stream = stream_of(data)
        failed = False

        def attempt() -> None:
            nonlocal failed
            try:
                self._inner.put(key, stream, create_only=create_only, pace=pace)
            except FencedError:
                if not failed or not self._holds(key, stream):
                    raise
            except CkptdError:
                failed = True
                raise

        self._call("put", key, attempt)

    def _holds(self, key: str, data: Stream) -> bool:
        """Whether just these bytes are under `key`, read in pieces, so that an object of any size may be compared."""
        try:
            if self._inner.size_bytes(key) != data.size_bytes:
                return False
        except NotFoundError:
            return False
        found = memoryview(bytearray(min(_COMPARED_BYTES, data.size_bytes)))
        for begin in range(0, data.size_bytes, _COMPARED_BYTES):
            end = min(begin + _COMPARED_BYTES, data.size_bytes)
            self._inner.read_into(key, begin, found[: end - begin])
            if found[: end - begin] != piece(data, begin, end):
                return False
        return True

    def close(self) -> None:
        """End all waiting, then close the tier within."""
        self._retrier.close()
        super().close()
