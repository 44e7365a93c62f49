"""Fetches: file by file from the cheapest tier that has a good copy, and nothing that is there already."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ckptd.errors import CkptdError, DamagedError, FullError, NotFoundError, RefusedError, StoreError
from ckptd.storage import keys
from ckptd.storage.fetching import fetch
from ckptd.storage.image import BLOCK_BYTES
from ckptd.storage.local import LocalTier
from ckptd.storage.memory import MemoryTier
from ckptd.storage.tier import Data, Pace
from ckptd.storage.wrappers import MeteredTier
from tests.storage.checkpoints import (
    DAMAGE,
    FILE,
    FIRST,
    JOB,
    KEY,
    LATER,
    MANIFEST,
    Bucket,
    fill,
    good,
    is_right,
    needed,
)


@pytest.mark.parametrize("checkpoint", [FIRST, LATER])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_checkpoint_comes_back(target: LocalTier, checkpoint, threads: int) -> None:
    """From nothing, the files that the checkpoint needs and its manifest come, each byte once; later, none."""
    bucket = MeteredTier(fill(Bucket()))
    told: list[int] = []
    fetched = fetch([bucket], target, JOB, checkpoint, threads=threads, progress=told.append)
    assert {f"{JOB}/{file}": tier for file, tier in fetched.origins.items()} == dict.fromkeys(
        needed(checkpoint), "bucket"
    )
    assert fetched.size_bytes == sum(told) == sum(len(good()[key]) for key in needed(checkpoint))
    read_bytes = bucket.snapshot()["read_into"]["bytes"]
    headers_bytes = BLOCK_BYTES * len(needed(checkpoint))  # what is in a file is looked up before it comes
    assert fetched.size_bytes <= read_bytes <= fetched.size_bytes + headers_bytes
    assert is_right(target, checkpoint)
    assert {entry.key for entry in target.list("")} == {keys.manifest_key(JOB, checkpoint), *needed(checkpoint)}
    again = fetch([bucket], target, JOB, checkpoint)
    assert set(again.origins.values()) == {"local"}
    assert again.size_bytes == 0
    assert bucket.snapshot()["read_into"]["bytes"] == read_bytes


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_only_what_is_damaged_is_fetched(target: LocalTier, damage: str) -> None:
    """Of a checkpoint that is there, the one file that is damaged is replaced and no other is read elsewhere."""
    fill(target)
    DAMAGE[damage](target, KEY)
    bucket = fill(Bucket())
    told: list[str] = []
    fetched = fetch([bucket], target, JOB, FIRST, report=lambda event, _: told.append(event))
    assert [file for file, tier in fetched.origins.items() if tier == "bucket"] == [FILE]
    assert told == ["file wanted" if damage == "missing" else "file damaged", "file fetched"]
    assert bucket.read == {KEY}
    assert is_right(target, FIRST)


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_a_damaged_copy_falls_through_to_the_next(target: LocalTier, tmp_path: Path, damage: str) -> None:
    """When the cheaper copy of a file is damaged, that file comes from the next tier, and this is reported."""
    near, bucket = fill(LocalTier(tmp_path / "near")), fill(Bucket())
    near.name = "near"
    DAMAGE[damage](near, KEY)
    events: list[tuple[str, str]] = []
    fetched = fetch(
        [bucket, near], target, JOB, FIRST, report=lambda event, fields: events.append((event, fields["file"]))
    )
    assert sorted(fetched.origins.values()) == ["bucket", "near"]
    assert fetched.origins[FILE] == "bucket"
    assert ("copy unusable", FILE) in events
    assert is_right(target, FIRST)


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_what_is_good_nowhere_is_not_committed(target: LocalTier, damage: str) -> None:
    """When the only copy of a file is damaged, that is the error, and the checkpoint does not appear."""
    bucket = fill(Bucket())
    DAMAGE[damage](bucket, KEY)
    with pytest.raises(DamagedError, match=FILE) as caught:
        fetch([bucket], target, JOB, FIRST)
    assert caught.value.hint
    assert not {KEY, MANIFEST} & {entry.key for entry in target.list("")}


def test_the_cheapest_is_asked_first(target: LocalTier, tmp_path: Path) -> None:
    """A copy on a disk is taken before one in a bucket, in whatever order they are named."""
    bucket = fill(Bucket())
    fetched = fetch([bucket, fill(LocalTier(tmp_path / "near"))], target, JOB, FIRST)
    assert set(fetched.origins.values()) == {"local"}
    assert bucket.read == set()


def test_a_source_that_hangs_is_left(target: LocalTier) -> None:
    """A source that answers nothing for a while is left for the next one, and asked last from then on."""
    release = threading.Event()

    class Hanging(MemoryTier):
        calls = 0

        def read_into(self, key: str, offset: int, into: memoryview) -> None:
            self.calls += 1
            release.wait()
            into[:] = bytes(len(into))  # too late: nobody may see this

    hanging, bucket = fill(Hanging()), fill(Bucket())
    try:
        fetched = fetch([hanging, bucket], target, JOB, LATER, stall_s=0.3, threads=1)
    finally:
        release.set()
    assert set(fetched.origins.values()) == {"bucket"}
    assert hanging.calls <= 8
    assert is_right(target, LATER)


def test_a_source_that_is_slow_is_better_than_none(target: LocalTier) -> None:
    """The last source is waited for longer, as there is nothing to turn to; if it hangs that is an error in the end."""
    release = threading.Event()

    class Slow(MemoryTier):
        def read_into(self, key: str, offset: int, into: memoryview) -> None:
            release.wait(0.3)
            super().read_into(key, offset, into)

    class Hanging(MemoryTier):
        def size_bytes(self, key: str) -> int:
            release.wait()
            return super().size_bytes(key)

    try:
        fetch([fill(Slow())], target, JOB, FIRST, stall_s=0.1)
        assert is_right(target, FIRST)
        with pytest.raises(StoreError, match="no answer from memory://"):
            fetch([fill(Hanging())], target, JOB, LATER, stall_s=0.05)
    finally:
        release.set()


@pytest.mark.parametrize(("error", "kind"), [(StoreError, StoreError), (RefusedError, RefusedError)])
def test_a_source_that_fails_is_no_damage(target: LocalTier, error: type[CkptdError], kind: type[CkptdError]) -> None:
    """When a good copy may be where nothing can be read now, the error says so and whether to try again."""

    class Failing(Bucket):
        def read_into(self, key: str, offset: int, into: memoryview) -> None:
            raise error("nothing can be read")

    with pytest.raises(kind, match="nothing can be read") as caught:
        fetch([fill(Failing())], target, JOB, FIRST)
    assert caught.value.retryable == error.retryable
    assert MANIFEST not in {entry.key for entry in target.list("")}


def test_a_target_that_fails_is_not_the_sources_fault(target: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is raised as it is, and no other source is tried for it."""
    first, second = fill(Bucket()), fill(Bucket())

    def full(key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        raise FullError("no space left")

    monkeypatch.setattr(target, "put", full)
    with pytest.raises(FullError):
        fetch([first, second], target, JOB, FIRST)
    assert not first.read and not second.read


def test_a_file_that_the_disk_can_not_read_is_replaced(target: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector is damage like any: the file and the manifest come from elsewhere."""
    fill(target)
    real_read, real_get = target.read_into, target.get

    def read_into(key: str, offset: int, into: memoryview) -> None:
        if key == KEY:
            raise StoreError("can't read: Input/output error")
        real_read(key, offset, into)

    def get(key: str) -> bytes:
        if key == MANIFEST:
            raise StoreError("can't read: Input/output error")
        return real_get(key)

    with monkeypatch.context() as patched:
        patched.setattr(target, "read_into", read_into)
        patched.setattr(target, "get", get)
        fetched = fetch([fill(Bucket())], target, JOB, FIRST)
    assert fetched.origins[FILE] == "bucket"
    assert is_right(target, FIRST)


def test_a_checkpoint_that_is_nowhere(target: LocalTier) -> None:
    """It is not found, and where was looked is said; when a tier could not be asked, that is the error."""
    with pytest.raises(NotFoundError, match="g1/s10 of job gpt is on none of local, bucket: it was pruned"):
        fetch([Bucket()], target, JOB, FIRST)
    down = Bucket()

    def get(key: str) -> bytes:
        raise StoreError("the bucket is down")

    down.get = get  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="down"):
        fetch([down, Bucket()], target, JOB, FIRST)
