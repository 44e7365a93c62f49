"""The retrying wrapper: what is tried again, how long, and how a put that succeeded unheard is no lost race."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import CkptdError, DamagedError, FencedError, FullError, NotFoundError, RefusedError, StoreError
from ckptd.storage.memory import MemoryTier
from ckptd.storage.tier import Data, Entry, Pace
from ckptd.storage.wrappers import RetryingTier, RetryPolicy, next_delay

POLICY = RetryPolicy(first_delay_s=1.0, max_delay_s=8.0, deadline_s=30.0)


class _Faulty(MemoryTier):
    """A memory tier whose next calls fail, before or after they have done what they should."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[CkptdError] = []
        self.after: list[CkptdError] = []
        self.calls: list[str] = []

    def _begin(self, call: str) -> None:
        self.calls.append(call)
        if self.before:
            raise self.before.pop(0)

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        self._begin("put")
        super().put(key, data, create_only=create_only, pace=pace)
        if self.after:
            raise self.after.pop(0)

    def get(self, key: str) -> bytes:
        self._begin("get")
        return super().get(key)

    def size_bytes(self, key: str) -> int:
        self._begin("size_bytes")
        return len(MemoryTier.get(self, key))

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        self._begin("read_into")
        into[:] = MemoryTier.get(self, key)[offset : offset + len(into)]

    def list(self, prefix: str) -> Iterator[Entry]:
        for number, entry in enumerate(super().list(prefix)):
            if number == 1:
                self._begin("list")
            yield entry


class _World:
    """A clock that moves when somebody sleeps, and what was reported."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []
        self.reported: list[tuple[str, int, float, CkptdError]] = []

    def sleep(self, delay_s: float) -> None:
        self.slept.append(delay_s)
        self.now_s += delay_s

    def wrap(
        self, tier: MemoryTier, policy: RetryPolicy = POLICY, rng: Callable[[], float] = lambda: 0.5
    ) -> RetryingTier:
        return RetryingTier(
            tier,
            policy,
            sleep=self.sleep,
            random=rng,
            clock=lambda: self.now_s,
            report=lambda *told: self.reported.append(told),
        )


@given(
    attempt=st.integers(1, 10_000),
    elapsed_s=st.floats(0, 1000),
    first_s=st.floats(0.001, 10),
    times=st.floats(1, 1000),
    deadline_s=st.floats(0, 1000),
    drawn=st.floats(0, 1, exclude_max=True),
)
def test_delays_keep_their_bounds(
    attempt: int, elapsed_s: float, first_s: float, times: float, deadline_s: float, drawn: float
) -> None:
    """A delay is below its doubling bound, and never leads past the deadline or the last attempt."""
    policy = RetryPolicy(first_s, first_s * times, deadline_s, max_attempts=5_000)
    delay_s = next_delay(attempt, elapsed_s, policy, lambda: drawn)
    if delay_s is None:
        assert attempt >= 5_000 or elapsed_s + first_s * times > deadline_s
        return
    assert attempt < 5_000
    assert 0 <= delay_s <= policy.max_delay_s
    assert delay_s <= policy.first_delay_s * 2.0 ** min(attempt - 1, 100)
    assert elapsed_s + delay_s <= deadline_s


def test_delays_double_and_spread() -> None:
    """The bound doubles up to its largest, and below it every delay is as likely."""
    policy = RetryPolicy(first_delay_s=1.0, max_delay_s=8.0, deadline_s=1000.0)
    assert [next_delay(attempt, 0.0, policy, lambda: 1.0) for attempt in range(1, 7)] == [1, 2, 4, 8, 8, 8]
    rng = random.Random(1)
    drawn = [next_delay(3, 0.0, policy, rng.random) or 0.0 for _ in range(4000)]
    assert [sum(low <= delay < low + 1 for delay in drawn) > 800 for low in range(4)] == [True] * 4


def test_a_transient_error_is_tried_again() -> None:
    """Each operation is made again after a transient error, with growing delays, and each retry is reported."""
    world, tier = _World(), _Faulty()
    tiers = world.wrap(tier)
    first, second = StoreError("slow down"), FullError("no room")
    tier.before = [first, second]
    tiers.put("job/a", b"1")
    assert tier.calls == ["put"] * 3
    assert world.reported == [("put job/a", 1, 0.5, first), ("put job/a", 2, 1.0, second)]
    assert world.slept == [0.5, 1.0]
    tier.put("job/b", b"2")
    for call in (
        lambda: tiers.get("job/a") == b"1",
        lambda: tiers.size_bytes("job/a") == 1,
        lambda: tiers.read_into("job/a", 0, memoryview(bytearray(1))) is None,
    ):
        tier.before = [StoreError("reset")]
        assert call()
    tier.before = [StoreError("reset")]
    assert sorted(entry.key for entry in tiers.list("job/")) == ["job/a", "job/b"], "a listing that failed half way"


@pytest.mark.parametrize("kind", [NotFoundError, DamagedError, RefusedError, FencedError])
def test_what_no_retry_changes_is_raised_at_once(kind: type[CkptdError]) -> None:
    """An error that says it is not transient comes out of the first attempt."""
    world, tier = _World(), _Faulty()
    tier.before = [kind("for good")]
    with pytest.raises(kind, match="for good"):
        world.wrap(tier).get("job/a")
    tier.before = [kind("for good")]
    with pytest.raises(kind, match="for good"):
        world.wrap(tier).put("job/a", b"", create_only=True)
    assert (world.slept, world.reported) == ([], [])


def test_the_deadline_ends_it() -> None:
    """A store that stays away costs the deadline at most, and the last error comes out."""
    world, tier = _World(), _Faulty()
    tier.before = [StoreError(f"failure {number}") for number in range(1000)]
    with pytest.raises(StoreError, match="failure"):
        world.wrap(tier).get("job/a")
    assert 30.0 - 4.0 <= world.now_s - 100.0 <= 30.0
    assert world.slept == [0.5, 1.0, 2.0, *[4.0] * 6]


def test_attempts_are_bounded_too() -> None:
    """Delays that happen to be tiny do not make a storm of attempts."""
    world, tier = _World(), _Faulty()
    tier.before = [StoreError("down")] * 1000
    with pytest.raises(StoreError):
        world.wrap(tier, RetryPolicy(max_attempts=7), lambda: 0.0).get("job/a")
    assert len(tier.calls) == 7


def test_a_put_that_succeeded_unheard_is_a_success() -> None:
    """When the answer to a create-only put was lost, the fenced second attempt finds its own object and returns."""
    world, tier = _World(), _Faulty()
    for size in (0, 10, 9 * 2**20 + 1):
        data = bytes(number % 251 for number in range(size))
        tier.after = [StoreError("the connection was reset")]
        world.wrap(tier).put(f"job/{size}", [data[:7], data[7:]], create_only=True)
        assert MemoryTier.get(tier, f"job/{size}") == data


@pytest.mark.parametrize("theirs", [b"theirs", b"our", b"ours and more", b""])
def test_a_lost_race_after_a_failure_is_still_lost(theirs: bytes) -> None:
    """When the first attempt came to nothing and another agent's object is there, the put is fenced."""
    world, tier = _World(), _Faulty()
    tier.objects["job/a"] = (theirs, 0.0)
    tier.before = [StoreError("timed out")]
    with pytest.raises(FencedError):
        world.wrap(tier).put("job/a", b"ours!!", create_only=True)
    assert tier.objects["job/a"][0] == theirs


def test_the_same_bytes_without_a_failure_are_a_lost_race() -> None:
    """An object that is there before the first attempt is another's, whatever its bytes."""
    world, tier = _World(), _Faulty()
    tier.objects["job/a"] = (b"same", 0.0)
    with pytest.raises(FencedError):
        world.wrap(tier).put("job/a", b"same", create_only=True)
    assert tier.calls == ["put"]


def test_looking_back_is_tried_again_too() -> None:
    """A transient error while the object is compared costs another attempt, not the put."""
    world, tier = _World(), _Faulty()
    tier.after = [StoreError("reset")]
    failing = iter([None, None, StoreError("size"), None, None, StoreError("read"), None, None, None])
    begin = tier._begin

    def fail_later(call: str) -> None:
        error = next(failing, None)
        tier.before = [error] if error else []
        begin(call)

    tier._begin = fail_later  # type: ignore[method-assign]
    world.wrap(tier).put("job/a", b"ours", create_only=True)
    assert tier.calls == [
        "put",
        "put",
        "size_bytes",
        "put",
        "size_bytes",
        "read_into",
        "put",
        "size_bytes",
        "read_into",
    ]


def test_an_object_that_vanished_is_no_success() -> None:
    """A fenced put whose object is gone when it is looked at stays fenced."""

    class Vanishing(_Faulty):
        def size_bytes(self, key: str) -> int:
            self.delete(key)
            return super().size_bytes(key)

    world, tier = _World(), Vanishing()
    tier.after = [StoreError("reset")]
    with pytest.raises(FencedError):
        world.wrap(tier).put("job/a", b"ours", create_only=True)


def test_a_pace_pays_for_every_attempt() -> None:
    """Bytes that are sent again are asked for again: that is what the bandwidth sees."""
    world, tier = _World(), _Faulty()
    asked: list[int] = []
    tier.after = [StoreError("reset")]
    world.wrap(tier).put("job/a", b"12345", pace=asked.append)
    assert asked == [5, 5]


def test_closing_ends_the_waiting() -> None:
    """A call that waits for its next attempt ends with its error when the tier is closed, at once."""
    tier = _Faulty()
    tier.before = [StoreError("down")] * 1000
    waiting = threading.Event()
    tiers = RetryingTier(tier, RetryPolicy(60.0, 60.0, 600.0), random=lambda: 0.9, report=lambda *_: waiting.set())
    ended: list[CkptdError] = []

    def work() -> None:
        try:
            tiers.get("job/a")
        except StoreError as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    begin_s = time.monotonic()
    thread.start()
    assert waiting.wait(10)
    tiers.close()
    thread.join(10)
    assert time.monotonic() - begin_s < 10
    assert [error.message for error in ended] == ["down"]


def test_many_at_once_spread_out() -> None:
    """Agents that one outage stopped at the same moment come back at different ones."""
    worlds = [_World() for _ in range(20)]
    for number, world in zip(count(), worlds, strict=False):
        tier = _Faulty()
        tier.before = [StoreError("down")]
        world.wrap(tier, rng=random.Random(number).random).put("job/a", b"")
    assert len({round(world.now_s, 3) for world in worlds}) > 15
