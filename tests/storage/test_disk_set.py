"""What makes several disks one store: missing, swapped and foreign disks are told from good ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import ConfigError, NotFoundError, RefusedError
from ckptd.storage.disk_set import MARK, Mark, is_set, judge, refuse_alone
from ckptd.storage.disks import DisksTier
from ckptd.storage.local import LocalTier
from ckptd.testing.working import at_once, pattern, raise_first
from ckptd_plugins.storage_local import open_local
from tests.storage.test_disks import holders, shard

_FOLDERS = ("/a", "/b", "/c")


def marks(name: str = "ours", *, is_complete: bool = True) -> list[Mark | None]:
    """The marks of three disks."""
    return [Mark(name, number, _FOLDERS, is_complete) for number in (1, 2, 3)]


def test_what_is_a_set() -> None:
    """Disks are a set when all have a mark of it and one is complete, and none yet when no mark is."""
    assert judge(marks(), _FOLDERS)
    assert judge([*marks()[:1], *marks(is_complete=False)[1:]], _FOLDERS)
    assert not judge(marks(is_complete=False), _FOLDERS)
    assert not judge([None, None, None], _FOLDERS)
    assert not judge([None, *marks("killed", is_complete=False)[1:]], _FOLDERS)


@given(st.integers(0, 2), st.sampled_from(["none", "foreign", "moved"]))
def test_what_does_not_fit(at: int, wrong: str) -> None:
    """Whichever disk is missing, foreign or in another's place: it is an error, never a set and never a new one."""
    found = marks()
    found[at] = {"none": None, "foreign": marks("theirs")[at], "moved": marks()[at - 1]}[wrong]
    with pytest.raises(RefusedError) as caught:
        judge(found, _FOLDERS)
    assert MARK in str(caught.value.hint) or "belongs to one store" in str(caught.value.hint)
    if wrong != "foreign":
        assert caught.value.message.startswith(f"{_FOLDERS[at]} is not disk {at + 1} of 3 of this store: it ")


@pytest.fixture
def tier(folders: list[Path]) -> DisksTier:
    """Three disks."""
    return DisksTier(folders)


class _MadeMeanwhile(LocalTier):
    """A disk whose set is made by somebody else right after its mark was looked for the first time."""

    make: Callable[[], object] | None = None

    def get(self, key: str) -> bytes:
        make, self.make = self.make, None
        try:
            return super().get(key)
        finally:
            if make is not None:
                make()


@pytest.mark.parametrize("before", ["nothing", "a set that was never finished"])
def test_a_set_that_is_made_while_somebody_looks(folders: list[Path], before: str) -> None:
    """Who reads beside the first start finds a set or none yet, and never that a disk is missing."""
    disks = [_MadeMeanwhile(folders[0]), *map(LocalTier, folders[1:])]
    if before != "nothing":
        disks[0].put(MARK, json.dumps(asdict(Mark("killed", 1, tuple(map(str, folders)), is_complete=False))).encode())
    disks[0].make = DisksTier(folders).check_writable
    assert is_set(disks)


def test_one_disk_alone(tier: DisksTier, folders: list[Path]) -> None:
    """A disk of a set is refused as a store of its own, any other folder is not."""
    tier.check_writable()
    for folder in folders:
        with pytest.raises(RefusedError) as caught:
            refuse_alone(LocalTier(folder))
        assert tier.url in str(caught.value.hint)
    refuse_alone(LocalTier(folders[0].with_name("another")))


def test_a_disk_lost_between_runs(tier: DisksTier, folders: list[Path]) -> None:
    """An empty folder where a disk was is refused by whoever reads or writes, and nothing is written to it."""
    for rank in range(3):
        tier.put(shard(rank), b"x")
    tier.close()
    folders[1].rename(folders[1].with_name("unmounted"))
    folders[1].mkdir()
    for act in (
        lambda tier: tier.check_writable(),
        lambda tier: tier.put(shard(5), b"x"),
        lambda tier: list(tier.list("")),
        lambda tier: tier.get("nowhere"),
    ):
        with pytest.raises(RefusedError) as caught:
            act(DisksTier(folders))
        assert caught.value.message.startswith(f"{folders[1]} is not disk 2 of 3 of this store: it has no {MARK}")
        assert "mount it" in str(caught.value.hint)
    assert list(folders[1].iterdir()) == []


def test_a_replaced_disk(tier: DisksTier, folders: list[Path]) -> None:
    """With the marks removed a new disk is taken in; what the old one had is missing, and can be put again."""
    for rank in range(3):
        tier.put(shard(rank), pattern(100, seed=rank))
    (lost,) = (rank for rank in range(3) if holders(tier, shard(rank)) == [1])
    tier.close()
    folders[1].rename(folders[1].with_name("broken"))
    for folder in (folders[0], folders[2]):
        (folder / MARK).unlink()
    other = DisksTier(folders)
    other.check_writable()
    with pytest.raises(NotFoundError):
        other.get(shard(lost))
    other.put(shard(lost), pattern(100, seed=lost))
    assert [other.get(shard(rank)) for rank in range(3)] == [pattern(100, seed=rank) for rank in range(3)]


def test_a_link_to_another_disk(tmp_path: Path) -> None:
    """One folder under two names is no second disk, and stays a store of its own."""
    LocalTier(tmp_path / "a").check_writable()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ConfigError, match="b is the same folder as "):
        open_local(f"{tmp_path}/a,{tmp_path}/b", {})
    open_local(f"{tmp_path}/a", {}).check_writable()


def test_disks_in_another_order(tier: DisksTier, folders: list[Path]) -> None:
    """Swapped, fewer or more disks are refused, with how they were named."""
    tier.check_writable()
    named = ",".join(map(str, folders))
    for wrong in (folders[::-1], folders[:2], [*folders, folders[0].with_name("nvme3")]):
        with pytest.raises(RefusedError) as caught:
            DisksTier(wrong).check_writable()
        assert named in str(caught.value.hint)


def test_an_interrupted_first_start(tier: DisksTier, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the first start is killed while it marks the disks, the next one begins with a good set."""
    real, left = LocalTier.put, 0

    def put(self: LocalTier, key: str, *arguments: object, **options: object) -> None:
        nonlocal left
        if key == MARK:
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        real(self, key, *arguments, **options)  # type: ignore[arg-type]

    for marks in range(6):
        monkeypatch.setattr(LocalTier, "put", put)
        for folder in folders:
            (folder / MARK).unlink(missing_ok=True)
        left = marks
        with pytest.raises(KeyboardInterrupt):
            DisksTier(folders).check_writable()
        monkeypatch.setattr(LocalTier, "put", real)
        other = DisksTier(folders)
        other.check_writable()
        other.put(shard(marks), b"x")
    assert [path for folder in folders for path in folder.glob(".*") if path.name != MARK] == []


def test_a_store_of_one_disk_grows(tmp_path: Path, folders: list[Path]) -> None:
    """A folder that was a store alone can be the first of several disks; what it has is found there."""
    alone = LocalTier(folders[0])
    alone.put(shard(0), b"before")
    tier = DisksTier(folders)
    tier.check_writable()
    assert tier.get(shard(0)) == b"before"
    tier.put(shard(0), b"after")
    assert holders(tier, shard(0)) == [0]


def test_first_starts_at_once(folders: list[Path]) -> None:
    """Agents that open the same new disks at the same moment make one set of them."""
    raise_first(at_once(6, lambda number: DisksTier(folders).put(f"job-{number}/tags/a.json", b"x")))
    assert len({(folder / MARK).read_text().split('"number"')[0] for folder in folders}) == 1
    assert len({entry.key for entry in DisksTier(folders).list("")}) == 6


def test_a_mark_that_is_no_mark(tier: DisksTier, folders: list[Path]) -> None:
    """What can't be read is an error with a hint, and no reason to make a new set."""
    tier.check_writable()
    (folders[2] / MARK).write_bytes(b"\0" * 100)
    with pytest.raises(RefusedError, match=r"nvme2/\.ckptd-disk can't be read"):
        DisksTier(folders).check_writable()
