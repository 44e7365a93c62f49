"""The part of the suite of tiers that is about streams, and about what a tier declares, leaves behind and lets go."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from ckptd.errors import DamagedError, NotFoundError
from ckptd.storage.tier import Capabilities, Cost, FailureGroup, Tier
from ckptd.testing.expecting import expecting, only_if
from ckptd.testing.working import at_once, keys_of, pattern, raise_first

Found = TypeVar("Found")

_PART_BYTES = 16 * 2**20
_LONG_AGO_S = 24 * 3600.0
_PATIENCE_S = 5.0
"""For what a tier may do a moment later: a store's times in whole seconds, a connection that closes by itself."""


class StreamTests:
    """What `TierSuite` asks of streams, sweeping, closing and capabilities."""

    racers = 8
    """How many threads race in the tests that race."""

    def reopen(self, tier: Tier) -> Tier | None:
        """Return another tier at the same place, that shares nothing in memory with `tier`; None if there is none."""
        del tier
        return None

    def litter(self, tier: Tier) -> bool:
        """Leave below "job/" what a put leaves there that is killed in the middle; False if that is nothing."""
        del tier
        return False

    # --- streams ----------------------------------------------------------------------------------------------

    def test_puts_streams(self, tier: Tier) -> None:
        """What a stream gives piece by piece becomes one object, be it small or large, and is paced like buffers."""
        for size in (0, 1, 2**20 + 5, 9 * 2**20 + 7):
            stream, asked = _Pieces(pattern(size, seed=size)), list[int]()
            tier.put(f"streams/{size}", stream, pace=asked.append)
            assert tier.size_bytes(f"streams/{size}") == size
            assert tier.get(f"streams/{size}") == stream.data, f"a stream of {size} bytes was put changed"
            assert stream.untouched == 0, f"{stream.untouched} bytes of the stream were never asked for"
            assert sum(asked) == size, f"a stream of {size} bytes asked for {sum(asked)}"

    def test_puts_streams_from_many_threads(self, tier: Tier) -> None:
        """Several puts run at once, some of them from one stream, and each object is right."""
        shared = _Pieces(pattern(3 * 2**20 + 1, seed=20))

        def work(number: int) -> None:
            mine = shared if number % 2 else _Pieces(pattern(2 * 2**20 + number, seed=number))
            tier.put(f"streams/{number}", mine)
            assert tier.get(f"streams/{number}") == mine.data

        raise_first(at_once(self.racers, work))
        assert len(keys_of(tier, "streams/")) == self.racers

    def test_claims_with_a_stream(self, tier: Tier) -> None:
        """A create-only put takes a stream too."""
        only_if(tier.capabilities.create_only_put, "the tier declares no create-only put")
        tier.put("streams/claimed", _Pieces(pattern(2**20, seed=21)), create_only=True)
        assert tier.get("streams/claimed") == pattern(2**20, seed=21)

    def test_puts_large_streams_in_parts(self, tier: Tier) -> None:
        """With `multipart` an object of several parts is put from pieces, none of them nearly as large as the whole."""
        only_if(tier.capabilities.multipart, "the tier declares no multipart put")
        size = 3 * _PART_BYTES + 12_345
        stream, asked = _Pieces(pattern(size, seed=22)), list[int]()
        tier.put("streams/large", stream, pace=asked.append)
        assert tier.size_bytes("streams/large") == size
        assert stream.largest <= size // 2, f"{stream.largest} of {size} bytes were read into memory at once"
        assert stream.untouched == 0
        assert (sum(asked), max(asked) <= size // 2) == (size, True), f"the pace was asked for {asked}"
        for begin in range(0, size, _PART_BYTES):
            found = memoryview(bytearray(min(_PART_BYTES, size - begin)))
            tier.read_into("streams/large", begin, found)
            assert found == stream.data[begin : begin + len(found)], f"the part from byte {begin} is wrong"

    def test_a_damaged_stream_puts_nothing(self, tier: Tier) -> None:
        """An error of the stream comes out as it is; no object appears, and one that was there stays as it was."""
        tier.put("streams/before", b"as it was")
        sizes = [3, 2**20 + 5, 9 * 2**20]
        if tier.capabilities.multipart:
            sizes.append(3 * _PART_BYTES)
        for size in sizes:
            for key in ("streams/before", "streams/never"):
                stream = _Pieces(pattern(size, seed=23), damaged_at=size // 2)
                with expecting(DamagedError, "a damaged stream was put") as caught:
                    tier.put(key, stream)
                assert caught.error.message == _Pieces.damage, f"the stream's error became {caught.error!r}"
            assert tier.get("streams/before") == b"as it was"
            assert keys_of(tier, "") == {"streams/before"}
            with expecting(NotFoundError, "half a stream can be read"):
                tier.get("streams/never")
        tier.put("streams/never", b"now")
        assert tier.get("streams/never") == b"now"

    # --- what it declares, leaves and lets go -----------------------------------------------------------------

    def test_capabilities_fit_each_other(self, tier: Tier) -> None:
        """Each capability is of its type, none contradicts another, and they stay what they are."""
        can = tier.capabilities
        assert isinstance(can, Capabilities)
        assert isinstance(can.cost, Cost), f"{can.cost!r} is no cost"
        assert isinstance(can.failure_group, FailureGroup), f"{can.failure_group!r} is no failure group"
        for item in fields(can):
            value = getattr(can, item.name)
            assert item.name in ("cost", "failure_group") or isinstance(value, bool), f"{item.name} is {value!r}"
        assert not (can.lends_files and can.cost is Cost.NETWORK), "what lies across a network can't be lent"
        assert not (can.failure_group is FailureGroup.PROCESS and can.cost is Cost.DISK), "a disk outlives a process"
        assert tier.capabilities == can

    def test_lends_what_it_says(self, tier: Tier) -> None:
        """With `lends_files` a descriptor is of the object itself, not of a copy made for it."""
        only_if(tier.capabilities.lends_files, "the tier declares that it lends no files")
        tier.put("lent", pattern(2**20, seed=24))
        descriptors = [tier.open("lent") for _ in range(2)]
        try:
            first, second = map(os.fstat, descriptors)
            assert (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino), "two descriptors, two copies"
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def test_sweeps_no_object(self, tier: Tier) -> None:
        """However young an object is, a sweep leaves it, and has nothing to report where nothing was left behind."""
        tier.put("job/s1/a", pattern(2 * 2**20, seed=25))
        tier.put("job/s1/b", _Pieces(pattern(2**20 + 1, seed=26)))
        tier.delete("job/s1/b")
        tier.put("job-2/a", b"x")
        for prefix in ("", "job/", "job", "never/"):
            for age_s in (0.0, _LONG_AGO_S):
                swept = tier.sweep(prefix, age_s)
                assert list(swept) == [], f"a sweep of {prefix!r} after puts that ended says {swept}"
        assert keys_of(tier, "") == {"job/s1/a", "job-2/a"}
        assert tier.get("job/s1/a") == pattern(2 * 2**20, seed=25)

    def test_sweeps_what_killed_puts_leave(self, tier: Tier) -> None:
        """A sweep removes what is below its prefix and old enough, says so once, and leaves every object."""
        tier.put("job/s1/a", b"stays")
        only_if(self.litter(tier), "`litter` is not overridden: killed puts leave nothing")
        assert keys_of(tier, "") == {"job/s1/a"}, "what a killed put left is listed as an object"
        assert list(tier.sweep("job/", _LONG_AGO_S)) == [], "what is young was swept"
        assert list(tier.sweep("elsewhere/", 0.0)) == [], "what lies elsewhere was swept"
        swept = _until(lambda: tier.sweep("job/", 0.0))
        assert swept, "nothing was swept"
        assert all(isinstance(said, str) and said for said in swept)
        assert list(tier.sweep("job/", 0.0)) == [], "a second sweep found more"
        assert keys_of(tier, "") == {"job/s1/a"}
        assert tier.get("job/s1/a") == b"stays"

    def test_closes_after_work(self, tier: Tier) -> None:
        """After work in many threads a tier closes; descriptors that it gave stay good, and so do its objects."""
        data = pattern(2**20, seed=27)

        def work(number: int) -> None:
            tier.put(f"job/{number}", data)
            tier.read_into(f"job/{number}", 0, memoryview(bytearray(len(data))))

        raise_first(at_once(self.racers, work))
        descriptor = tier.open("job/0")
        try:
            tier.close()
            assert os.pread(descriptor, len(data) + 1, 0) == data, "a descriptor was lost with its tier"
        finally:
            os.close(descriptor)
        if tier.capabilities.failure_group is FailureGroup.PROCESS:
            return
        other = self.reopen(tier)
        only_if(other is not None, "`reopen` is not overridden")
        assert other is not None
        assert keys_of(other, "job/") == {f"job/{number}" for number in range(self.racers)}
        assert other.get("job/0") == data

    def test_lets_go_of_what_it_holds(self, tier: Tier) -> None:
        """Tiers that are opened, used and closed one after the other leave neither descriptors nor threads."""
        tier.put("job/a", pattern(2**20, seed=28))
        held = [0, 0]
        for turn in range(4):
            other = self.reopen(tier)
            only_if(other is not None, "`reopen` is not overridden")
            assert other is not None
            other.put(f"job/{turn}", pattern(2**20, seed=turn))
            raise_first(at_once(4, lambda _, other=other: other.get("job/a")))  # type: ignore[misc]
            other.close()
            del other
            if turn == 0:
                held = _held()  # with what the first use of a library keeps for good
        _until(lambda: _no_more_than(held))
        assert _no_more_than(held), f"{held} descriptors and threads became {_held()} with three tiers more"


class _Pieces:
    """A stream that knows what was asked of it, and may be damaged at one byte."""

    damage = "the tensor 'weight' is damaged"

    def __init__(self, data: bytes, *, damaged_at: int | None = None) -> None:
        self.data = data
        self._damaged_at = damaged_at
        self._lock = threading.Lock()
        self._asked: list[tuple[int, int]] = []

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def read_into(self, offset: int, into: memoryview) -> None:
        end = offset + len(into)
        assert 0 <= offset <= end <= len(self.data), f"bytes {offset} to {end} of {len(self.data)} were asked for"
        with self._lock:
            self._asked.append((offset, end))
        if self._damaged_at is not None and offset <= self._damaged_at < end:
            raise DamagedError(self.damage)
        into[:] = self.data[offset:end]

    @property
    def largest(self) -> int:
        """The size of the largest piece that was asked for."""
        return max((end - begin for begin, end in self._asked), default=0)

    @property
    def untouched(self) -> int:
        """How many bytes no piece had."""
        missing = reached = 0
        for begin, end in sorted([*self._asked, (len(self.data), len(self.data))]):
            missing += max(0, begin - reached)
            reached = max(reached, end)
        return missing


def _held() -> list[int]:
    """Return how many descriptors and threads this process has."""
    return [sum(1 for _ in Path("/proc/self/fd").iterdir()), threading.active_count()]


def _no_more_than(held: Sequence[int]) -> bool:
    return all(now <= before for now, before in zip(_held(), held, strict=True))


def _until(look: Callable[[], Found]) -> Found:
    """Return the first of its answers that is not empty, or the last one when patience ends."""
    end_s = time.monotonic() + _PATIENCE_S
    while not (found := look()) and time.monotonic() < end_s:
        time.sleep(0.02)
    return found
