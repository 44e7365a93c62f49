"""The verifying wrapper: puts that came out wrong, and reads that were short, do not pass for good ones."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from ckptd.errors import DamagedError, FencedError, NotFoundError, StoreError
from ckptd.storage.memory import MemoryTier
from ckptd.storage.tier import Data, Pace
from ckptd.storage.wrappers import RetryingTier, VerifyingTier

_LARGE = 3 * 2**20 + 11


class _Mangling(MemoryTier):
    """A memory tier that keeps something else than it was given, for some puts."""

    def __init__(self, mangle: Callable[[bytes], bytes | None], times: int = 1) -> None:
        super().__init__()
        self._mangle, self._times = mangle, times
        self.read: list[int] = []

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        super().put(key, data, create_only=create_only, pace=pace)
        if self._times > 0:
            self._times -= 1
            kept = self._mangle(self.objects[key][0])
            if kept is None:
                del self.objects[key]
            else:
                self.objects[key] = (kept, 0.0)

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        self.read.append(len(into))
        super().read_into(key, offset, into)


def _flip(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


_WRONG: dict[str, tuple[int, Callable[[bytes], bytes | None]]] = {
    "flipped": (1000, _flip(500)),
    "flipped first": (2**20, _flip(0)),
    "flipped last": (2**20, _flip(2**20 - 1)),
    "short": (1000, lambda data: data[:-1]),
    "long": (1000, lambda data: data + b"x"),
    "empty": (1000, lambda _: b""),
    "not empty": (0, lambda _: b"x"),
    "gone": (1000, lambda _: None),
    "large and short": (_LARGE, lambda data: data[:-1]),
    "large, begins wrong": (_LARGE, lambda data: bytes(4096) + data[4096:]),
    "large, ends wrong": (_LARGE, lambda data: data[:-4096] + bytes(4096)),
    "large, shifted": (_LARGE, lambda data: data[1:] + data[:1]),
    "large, wrong in the middle": (_LARGE, lambda data: data[: len(data) // 2] + bytes(5) + data[len(data) // 2 + 5 :]),
}


def _data(size: int) -> bytes:
    return b"".join(number.to_bytes(4, "big") for number in range(1, size // 4 + 2))[:size]


@pytest.mark.parametrize("case", _WRONG)
def test_a_put_that_came_out_wrong_is_an_error(case: str) -> None:
    """What is not as it was sent is removed, and raised as an error that a retry may cure; and it does cure it."""
    size, mangle = _WRONG[case]
    tier = _Mangling(mangle)
    with pytest.raises(StoreError, match="job/a was put and") as caught:
        VerifyingTier(tier).put("job/a", _data(size))
    assert caught.value.retryable
    assert tier.objects == {}
    for create_only in (False, True):
        again = _Mangling(mangle)
        tiers = RetryingTier(VerifyingTier(again), sleep=lambda _: None)
        tiers.put("job/a", [_data(size)], create_only=create_only)
        assert again.objects["job/a"][0] == _data(size)


def test_a_put_that_cannot_be_undone_says_so() -> None:
    """When the wrong object stays, the error says that too."""

    class Sticky(_Mangling):
        def delete(self, key: str) -> None:
            raise StoreError("no deletes today")

    with pytest.raises(StoreError, match="can't be removed: no deletes today"):
        VerifyingTier(Sticky(_flip(0))).put("job/a", b"12345")


def test_a_lost_race_removes_nothing() -> None:
    """A create-only put that is fenced is no put: the winner's object is not looked at, and stays."""
    tier = MemoryTier()
    tier.put("job/a", b"theirs")
    with pytest.raises(FencedError):
        VerifyingTier(tier).put("job/a", b"ours", create_only=True)
    assert tier.get("job/a") == b"theirs"


def test_what_others_put_where_ours_was_lost_stays() -> None:
    """Where the server refuses changed bytes, other ones behind a create-only put are somebody else's: they stay."""

    class Checking(_Mangling):
        capabilities = replace(MemoryTier.capabilities, server_checksum=True)

    tier = Checking(lambda _: b"theirs")
    with pytest.raises(StoreError, match="job/a was put and has"):
        VerifyingTier(tier).put("job/a", b"ours of another size", create_only=True)
    assert tier.get("job/a") == b"theirs"
    with pytest.raises(StoreError):
        VerifyingTier(Checking(lambda _: b"changed")).put("job/a", b"as it should be")


def test_reads_can_be_left_to_the_tier() -> None:
    """Without `reads` each read is one call of the tier within, while puts are looked at all the same."""
    tier = _Short(1)
    tier.put("job/a", _data(1000))
    verifying = VerifyingTier(tier, reads=False)
    assert len(verifying.get("job/a")) == 999
    os.close(verifying.open("job/a"))
    verifying.read_into("job/a", 0, memoryview(bytearray(1000)))
    with pytest.raises(StoreError):
        VerifyingTier(_Mangling(_flip(0)), reads=False).put("job/a", b"12345")


def test_looking_at_a_large_object_is_cheap() -> None:
    """Of a large object three blocks are read, and none where a tier would have to read it whole for them."""
    tier = _Mangling(lambda data: data)
    VerifyingTier(tier).put("job/a", bytes(_LARGE))
    assert sum(tier.read) == 3 * 2**16

    class Whole(_Mangling):
        capabilities = replace(MemoryTier.capabilities, range_read=False)

    whole = Whole(lambda data: data)
    VerifyingTier(whole).put("job/a", bytes(_LARGE))
    assert whole.read == []


class _Short(MemoryTier):
    """A memory tier that stops short and says nothing."""

    def __init__(self, missing: int) -> None:
        super().__init__()
        self._missing = missing

    def get(self, key: str) -> bytes:
        whole = super().get(key)
        return whole[: len(whole) - self._missing]

    def size_bytes(self, key: str) -> int:
        return len(super().get(key))

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        filled = max(0, len(into) - self._missing)
        super().read_into(key, offset, into[:filled])


@pytest.mark.parametrize("missing", [1, 2, 15, 16, 17, 1000])
def test_a_short_read_is_damage(missing: int) -> None:
    """Whatever a tier leaves out at the end is noticed, in every way of reading, at every size."""
    data = _data(1000)
    tier = _Short(missing)
    tier.put("job/a", data)
    verifying = VerifyingTier(tier)
    for read in (
        lambda: verifying.get("job/a"),
        lambda: os.close(verifying.open("job/a")),
        lambda: verifying.read_into("job/a", 0, memoryview(bytearray(1000))),
        lambda: verifying.read_into("job/a", 7, memoryview(bytearray(3))),
        lambda: verifying.read_into("job/a", 7, memoryview(bytearray(data[7:10]))),
    ):
        with pytest.raises(DamagedError, match="job/a"):
            read()


def test_bytes_that_look_like_the_mark_are_read() -> None:
    """Any content can be read, were it the mark that an unfilled end is known by."""
    marks: list[bytes] = []

    class Spying(MemoryTier):
        def read_into(self, key: str, offset: int, into: memoryview) -> None:
            marks.append(bytes(into))
            super().read_into(key, offset, into)

    tier = Spying()
    for last in range(256):
        data = b"any" + bytes([last])
        tier.put("job/a", data)
        into = memoryview(bytearray(4))
        VerifyingTier(tier).read_into("job/a", 0, into)
        assert into == data
    assert len({mark[-1] for mark in marks}) == 2
    assert len(marks) == 256 + 1, "more than one of all last bytes took a second read"


def test_an_object_that_is_replaced_meanwhile_is_no_damage() -> None:
    """Sizes that differ because somebody has put the object anew lead to another look."""
    replaced = threading.Event()

    class Replaced(MemoryTier):
        def get(self, key: str) -> bytes:
            found = super().get(key)
            if not replaced.is_set():
                replaced.set()
                self.put(key, found + b"more")
            return found

    tier = Replaced()
    tier.put("job/a", b"first")
    assert VerifyingTier(tier).get("job/a") == b"firstmore"


def test_an_object_that_is_deleted_meanwhile_was_read() -> None:
    """What was read before a prune took the object away is whole as far as anybody can tell."""

    class Deleted(MemoryTier):
        def size_bytes(self, key: str) -> int:
            raise NotFoundError(f"no object {key}")

    tier = Deleted()
    tier.put("job/a", b"first")
    assert VerifyingTier(tier).get("job/a") == b"first"
    os.close(VerifyingTier(tier).open("job/a"))


def test_a_failed_look_leaves_no_descriptor() -> None:
    """A descriptor whose size can't be checked is closed before the error comes out."""

    class Unsure(MemoryTier):
        opened: int = -1

        def open(self, key: str) -> int:
            self.opened = super().open(key)
            return self.opened

        def size_bytes(self, key: str) -> int:
            raise StoreError("timed out")

    tier = Unsure()
    tier.put("job/a", b"12345")
    with pytest.raises(StoreError, match="timed out"):
        VerifyingTier(tier).open("job/a")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(tier.opened)
