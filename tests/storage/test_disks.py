"""Several disks as one tier: the contract on them, where shards go, and what happens when a disk is full or gone."""

from __future__ import annotations

import os
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckptd.errors import DamagedError, FencedError, FullError, NotFoundError, RefusedError, StoreError
from ckptd.storage import keys
from ckptd.storage.disk_set import MARK
from ckptd.storage.disks import DisksTier
from ckptd.storage.local import LocalTier
from ckptd.storage.tier import Tier
from ckptd.testing.working import at_once, pattern, raise_first
from ckptd.types import CheckpointId
from tests.storage import test_tiers
from tests.storage.spared import skip_without_spares

MIB = 2**20
JOB = "job"


def folders_of(tier: Tier) -> list[Path]:
    """The folders that a tier of several disks lies in."""
    return [Path(part) for part in tier.url.split(",")]


def shard(rank: int, step: int = 1) -> str:
    """The key of a shard."""
    return keys.shard_key(JOB, CheckpointId(1, step), rank)


def holders(tier: Tier, key: str) -> list[int]:
    """On which disks a key is."""
    return [at for at, folder in enumerate(folders_of(tier)) if (folder / key).exists()]


def objects(tier: Tier) -> list[Path]:
    """Every file and folder on any disk, but for the marks."""
    return [path for folder in folders_of(tier) for path in folder.rglob("*") if path.name != MARK]


@pytest.fixture
def tier(folders: list[Path]) -> DisksTier:
    """Three disks."""
    return DisksTier(folders)


class TestDisksTier(test_tiers.TestLocalTier):
    """Several disks keep the contract."""

    @pytest.fixture
    def tier(self, folders: list[Path]) -> DisksTier:
        """Disks that hold nothing yet."""
        return DisksTier(folders)

    def reopen(self, tier: Tier) -> DisksTier:
        assert isinstance(tier, DisksTier)
        return type(tier)(folders_of(tier))

    def litter(self, tier: Tier) -> bool:
        folder = folders_of(tier)[1] / "job/s1"
        folder.mkdir(parents=True)
        (folder / ".tmp-0123456789abcdef-killed").write_bytes(b"half")
        return True

    test_create_only_has_one_winner_among_processes = None
    test_objects_outlive_a_killed_process = None


class _Everywhere(DisksTier):
    """Spreads whatever is put, so that the suite meets each disk."""

    def _is_spread(self, key: str) -> bool:
        return True


class TestSpreadTier(TestDisksTier):
    """What is spread over disks keeps the contract too."""

    @pytest.fixture
    def tier(self, folders: list[Path]) -> _Everywhere:
        """Disks that hold nothing yet."""
        return _Everywhere(folders)


# --- where shards go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_at_once", [True, False])
def test_shards_are_spread_evenly(tmp_path: Path, is_at_once: bool) -> None:
    """Eight shards of a checkpoint end two on each of four disks, and are found there by whoever comes later."""
    tier = DisksTier([tmp_path / f"d{number}" for number in range(4)])
    together = threading.Barrier(8 if is_at_once else 1)
    shards = [_Together(pattern(MIB + rank, seed=rank), together) for rank in range(8)]
    if is_at_once:
        raise_first(at_once(8, lambda rank: tier.put(shard(rank), shards[rank])))
    else:
        for rank, data in enumerate(shards):
            tier.put(shard(rank), data)
    assert Counter(at for rank in range(8) for at in holders(tier, shard(rank))) == dict.fromkeys(range(4), 2)
    for reader in (tier, DisksTier(folders_of(tier))):
        assert [reader.get(shard(rank)) for rank in range(8)] == [pattern(MIB + rank, seed=rank) for rank in range(8)]


class _Together:
    """A stream whose first reader waits until all others have begun."""

    def __init__(self, data: bytes, together: threading.Barrier) -> None:
        self.size_bytes = len(data)
        self._data, self._together, self._is_begun = data, together, False

    def read_into(self, offset: int, into: memoryview) -> None:
        if not self._is_begun:
            self._is_begun = True
            self._together.wait(60)
        into[:] = self._data[offset : offset + len(into)]


def test_checkpoints_of_one_shard_go_round(tier: DisksTier) -> None:
    """A job of one rank uses all disks in turn."""
    for step in range(1, 7):
        tier.put(shard(0, step), b"x")
    assert Counter(at for step in range(1, 7) for at in holders(tier, shard(0, step))) == {0: 2, 1: 2, 2: 2}


def test_what_commits_lies_on_the_first_disk(tier: DisksTier) -> None:
    """Manifests, records and tags have one place, so that a create-only put has one winner."""
    for key in ("job/g000001/generation.json", "job/g000001/s000000000001/manifest.json", "job/tags/best.json"):
        tier.put(key, b"{}", create_only=True)
        assert holders(tier, key) == [0]
        with pytest.raises(FencedError):
            DisksTier(folders_of(tier)).put(key, b"{}", create_only=True)


def test_create_only_sees_every_disk(tier: DisksTier, folders: list[Path]) -> None:
    """A manifest that lies on another disk, since a disk was replaced, is there all the same."""
    tier.check_writable()
    LocalTier(folders[2]).put("job/tags/best.json", b"old")
    with pytest.raises(FencedError, match="exists already"):
        tier.put("job/tags/best.json", b"new", create_only=True)
    tier.put("job/tags/best.json", b"new")
    assert holders(tier, "job/tags/best.json") == [0]


def test_a_repair_leaves_one_copy(tier: DisksTier, folders: list[Path]) -> None:
    """What is put again replaces the file where it is; of two copies that a crash has left one stays."""
    for rank in range(3):
        tier.put(shard(rank), pattern(MIB, seed=rank))
    before = [holders(tier, shard(rank)) for rank in range(3)]
    for rank in range(3):
        DisksTier(folders).put(shard(rank), pattern(MIB + 5, seed=50 + rank))
    assert [holders(tier, shard(rank)) for rank in range(3)] == before
    assert [tier.get(shard(rank)) for rank in range(3)] == [pattern(MIB + 5, seed=50 + rank) for rank in range(3)]
    for folder in folders:
        LocalTier(folder).put(shard(0), b"damaged")
    assert len([entry for entry in tier.list("job/") if entry.key == shard(0)]) == 1
    tier.put(shard(0), b"good")
    assert len(holders(tier, shard(0))) == 1
    assert [DisksTier(folders).get(shard(0)), tier.get(shard(0))] == [b"good", b"good"]


def test_puts_of_one_key_at_once_leave_one_copy(tier: DisksTier) -> None:
    """Threads that put the same shard leave it on one disk, whole."""
    raise_first(at_once(8, lambda number: tier.put(shard(0), pattern(MIB, seed=number))))
    assert len(holders(tier, shard(0))) == 1
    assert tier.get(shard(0)) in [pattern(MIB, seed=number) for number in range(8)]


def test_a_file_is_found_wherever_it_went(tier: DisksTier, folders: list[Path]) -> None:
    """What a tier remembers of a place may be wrong: another process has moved or deleted the file."""
    tier.put(shard(0), b"x")
    (at,) = holders(tier, shard(0))
    LocalTier(folders[(at + 1) % 3]).put(shard(0), b"moved")
    LocalTier(folders[at]).delete(shard(0))
    assert tier.get(shard(0)) == b"moved"
    assert tier.size_bytes(shard(0)) == 5
    tier.delete(shard(0))
    with pytest.raises(NotFoundError):
        tier.open(shard(0))
    assert objects(tier) == []


# --- disks that fail ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disks(folders: list[Path]) -> Iterator[list[Path]]:
    """Real filesystems: the first two with room for 8 MiB each, the third with room for 64."""
    if os.geteuid() != 0:
        pytest.skip("mounting a filesystem needs root")
    with ExitStack() as stack:
        for folder, size in zip(folders, ("8m", "8m", "64m"), strict=True):
            folder.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "ckptd-test", str(folder)]
            if subprocess.run(command, check=False, capture_output=True).returncode:
                pytest.skip("this machine mounts no tmpfs")
            stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
        yield folders


def test_a_full_disk_is_passed_over(small_disks: list[Path]) -> None:
    """Shards go where there is room, and when nowhere is any, the error says so of every disk and nothing is left."""
    tier = DisksTier(small_disks)
    for rank in range(8):
        tier.put(shard(rank), pattern(6 * MIB, seed=rank))
    found = Counter(at for rank in range(8) for at in holders(tier, shard(rank)))
    assert (found[0], found[1], found[2]) == (1, 1, 6)
    for rank in range(8):
        assert tier.get(shard(rank)) == pattern(6 * MIB, seed=rank)
    before = set(objects(tier))
    with pytest.raises(FullError) as caught:
        for rank in range(8, 14):
            tier.put(shard(rank), pattern(6 * MIB, seed=rank))
            before |= set(objects(tier))
    assert all(str(folder) in caught.value.message for folder in small_disks)
    assert caught.value.hint
    assert set(objects(tier)) == before


def test_a_disk_that_fills_meanwhile_is_passed_over(small_disks: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """When the room that a disk said it had is not there, the next disk gets the shard, whole."""
    monkeypatch.setattr(LocalTier, "free_bytes", 2**40)
    tier = DisksTier(small_disks)
    for rank in range(6):
        tier.put(shard(rank), pattern(7 * MIB, seed=rank))
    assert all(tier.get(shard(rank)) == pattern(7 * MIB, seed=rank) for rank in range(6))
    assert all(len(holders(tier, shard(rank))) == 1 for rank in range(6))


def test_who_is_passed_over_is_told_once(small_disks: list[Path]) -> None:
    """A full disk and one that refuses are told of once each, and again after they have taken a shard."""
    told: list[tuple[str, str, str]] = []
    tier = DisksTier(small_disks)
    tier.report_to(lambda event, fields: told.append((event, fields["disk"], fields["error"])))
    tier.check_writable()
    (small_disks[1] / "job").write_bytes(b"a file where a folder is needed")
    for rank in range(3):
        tier.put(shard(rank), pattern(6 * MIB, seed=rank))
    assert {disk for _, disk, _ in told} == set(map(str, small_disks[:2]))
    for rank in range(3, 6):
        tier.put(shard(rank), pattern(6 * MIB, seed=rank))
    assert [event for event, _, _ in told] == ["disk passed over"] * 2
    errors = {disk: error for _, disk, error in told}
    assert errors[str(small_disks[0])] == f"{small_disks[0]} has too little room for a shard"
    assert "can't write" in errors[str(small_disks[1])]
    (small_disks[1] / "job").unlink()
    for rank in range(6):
        tier.delete(shard(rank))
    for rank in range(4):
        tier.put(shard(rank, 2), pattern(6 * MIB, seed=rank))
    assert [disk for _, disk, _ in told[2:]] == [str(small_disks[0])]


def test_a_disk_that_is_gone_is_told_of(tier: DisksTier, folders: list[Path]) -> None:
    """What is said of a disk that is not there any more is that, and not how much room it has."""
    told: list[str] = []
    tier.report_to(lambda _, fields: told.append(fields["error"]))
    tier.check_writable()
    folders[1].rename(folders[1].with_name("elsewhere"))
    for rank in range(4):
        tier.put(shard(rank), b"x")
    assert told == [f"{folders[1]} is gone: it has no {MARK} any more"]


def test_when_no_disk_takes_it_none_is_passed_over(tier: DisksTier, folders: list[Path]) -> None:
    """Where every disk refuses, the error says so; nothing went anywhere else."""
    told: list[str] = []
    tier.report_to(lambda event, _: told.append(event))
    tier.check_writable()
    for folder in folders:
        (folder / "job").write_bytes(b"a file where a folder is needed")
    with pytest.raises(StoreError):
        tier.put(shard(0), b"x")
    assert told == []


def test_the_room_of_spares_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full of spares is not full: the next shard is written over one of them."""
    skip_without_spares(tmp_path)
    folders = [tmp_path / "a", tmp_path / "b"]
    tier = DisksTier(folders)
    for rank in range(2):
        tier.put(shard(rank, 1), pattern(4 * MIB, seed=rank))
    for rank in range(2):
        tier.put(shard(rank, 2), pattern(4 * MIB, seed=rank))
        tier.delete(shard(rank, 1))
    monkeypatch.setattr(
        os, "statvfs", lambda folder: SimpleNamespace(f_bavail=9 * MIB * (folder == folders[1]), f_frsize=1)
    )
    for rank in range(2):
        tier.put(shard(rank, 3), pattern(4 * MIB, seed=rank))
    assert sorted(at for rank in range(2) for at in holders(tier, shard(rank, 3))) == [0, 1]


def test_a_full_disk_beside_one_that_refuses_is_full(small_disks: list[Path]) -> None:
    """Where room would help, the error says so, so that some is made: whatever else is wrong with the other disks."""
    tier = DisksTier(small_disks)
    tier.check_writable()
    LocalTier(small_disks[0]).put("other", pattern(6 * MIB, seed=2))
    for folder in small_disks[1:]:
        (folder / "job").write_bytes(b"a file where a folder is needed")
    with pytest.raises(FullError) as caught:
        tier.put(shard(0), pattern(5 * MIB, seed=1))
    assert all(str(folder) in caught.value.message for folder in small_disks)
    assert "free some space" in str(caught.value.hint)


def test_a_start_beside_a_full_disk(small_disks: list[Path]) -> None:
    """A job begins while a disk is full, since shards pass it over; not while the first is, where commits go."""
    for at in (2, 1, 0):
        DisksTier(small_disks).check_writable()
        with pytest.raises(OSError, match="No space left"):
            (small_disks[at] / "other").write_bytes(bytes(65 * MIB))
    with pytest.raises(FullError, match="nvme0"):
        DisksTier(small_disks).check_writable()


def test_a_repair_moves_to_a_disk_with_room(small_disks: list[Path]) -> None:
    """When the disk that has a shard has no room for the new one, it moves, and the old one is gone."""
    tier = DisksTier(small_disks)
    tier.check_writable()
    LocalTier(small_disks[0]).put(shard(0), pattern(MIB, seed=1))
    LocalTier(small_disks[0]).put("job/other", pattern(6 * MIB, seed=2))
    tier.put(shard(0), pattern(5 * MIB, seed=3))
    assert holders(tier, shard(0)) == [2] or holders(tier, shard(0)) == [1]
    assert tier.get(shard(0)) == pattern(5 * MIB, seed=3)


def test_a_disk_that_goes_while_it_is_used(small_disks: list[Path]) -> None:
    """An unmounted disk gets nothing: shards go to the others, and listings say that a disk is missing."""
    tier = DisksTier(small_disks)
    tier.check_writable()
    subprocess.run(["umount", "-l", str(small_disks[1])], check=True)
    try:
        for rank in range(4):
            tier.put(shard(rank), pattern(MIB, seed=rank))
        assert list(small_disks[1].iterdir()) == []
        assert {at for rank in range(4) for at in holders(tier, shard(rank))} == {0, 2}
        with pytest.raises(RefusedError, match="nvme1 is not disk 2 of 3"):
            list(tier.list(""))
        with pytest.raises(RefusedError, match="nvme1 is not disk 2 of 3"):
            tier.get(shard(9))
        assert tier.get(shard(0)) == pattern(MIB, seed=0)
    finally:
        subprocess.run(["mount", "-t", "tmpfs", "ckptd-test", str(small_disks[1])], check=True)


def test_a_disk_that_refuses_is_passed_over(tier: DisksTier, folders: list[Path]) -> None:
    """A disk where nothing can be put, for another reason than room, is passed over too, and tried last for a while."""
    tier.check_writable()
    (folders[1] / "job").write_bytes(b"a file where a folder is needed")
    for rank in range(6):
        tier.put(shard(rank), b"x")
    assert Counter(at for rank in range(6) for at in holders(tier, shard(rank))) == {0: 3, 2: 3}


def test_when_the_first_disk_refuses_nothing_is_committed(tier: DisksTier, folders: list[Path]) -> None:
    """A manifest has one place: no other disk takes it."""
    tier.check_writable()
    (folders[0] / "job").write_bytes(b"a file where a folder is needed")
    with pytest.raises(StoreError):
        tier.put("job/g000001/generation.json", b"{}", create_only=True)
    assert not (folders[1] / "job").exists()


class _Broken:
    """A stream that can't be read."""

    size_bytes = 2 * MIB

    def __init__(self, error: Exception) -> None:
        self.error, self.reads = error, 0

    def read_into(self, offset: int, into: memoryview) -> None:
        self.reads += 1
        raise self.error


@pytest.mark.parametrize("error", [StoreError("the other store is down"), DamagedError("the copy is damaged")])
def test_a_stream_that_fails_is_no_disks_fault(tier: DisksTier, error: Exception) -> None:
    """What reading a stream raises is raised at once, and no other disk is tried."""
    stream = _Broken(error)
    with pytest.raises(type(error)) as caught:
        tier.put(shard(0), stream)
    assert caught.value is error
    assert {path.parent for path in objects(tier) if path.is_file()} == set()
    tier.put(shard(1), b"x")
    assert tier.get(shard(1)) == b"x"
