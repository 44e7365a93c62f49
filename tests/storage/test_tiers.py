"""The conformance suite, run on the tiers that ship in the core, and on broken tiers that it must catch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import SkipTest

import pytest

from ckptd.errors import FencedError, NotFoundError, StoreError
from ckptd.storage.local import LocalTier
from ckptd.storage.memory import MemoryTier
from ckptd.storage.tier import Capabilities, Data, Entry, Pace, Tier, buffers
from ckptd.testing import TierSuite, race


class TestMemoryTier(TierSuite):
    """The memory tier keeps the contract."""

    @pytest.fixture
    def tier(self) -> MemoryTier:
        """An empty memory tier."""
        return MemoryTier()


class TestLocalTier(TierSuite):
    """The local tier keeps the contract, and its create-only put holds between processes."""

    @pytest.fixture
    def tier(self, tmp_path: Path) -> LocalTier:
        """A local tier in a folder that does not exist yet."""
        return LocalTier(tmp_path / "store")

    def reopen(self, tier: Tier) -> LocalTier:
        return LocalTier(Path(tier.url))

    def test_create_only_has_one_winner_among_processes(self, tier: LocalTier) -> None:
        """Of several real processes that claim a key at once, one wins, and the file is its own."""
        code = """
from pathlib import Path
from ckptd.errors import FencedError
from ckptd.storage.local import LocalTier
number, root = sys.argv[1:]
tier = LocalTier(Path(root))
ready()
for turn in range(20):
    try:
        tier.put(f"job/claim-{turn}", number.encode() * 1000, create_only=True)
        print(turn)
    except FencedError:
        pass
"""
        won = [said.split() for said in race(code, 5, str(tier.root))]
        for turn in range(20):
            winners = [number for number, turns in enumerate(won) if str(turn) in turns]
            assert len(winners) == 1
            assert tier.get(f"job/claim-{turn}") == str(winners[0]).encode() * 1000

    def test_objects_outlive_a_killed_process(self, tier: LocalTier) -> None:
        """What a process put stays when it is killed right after."""
        code = """
import os, signal
from pathlib import Path
from ckptd.storage.local import LocalTier
tier = LocalTier(Path(sys.argv[2]))
ready()
tier.put("job/kept", b"x" * 2**21)
os.kill(os.getpid(), signal.SIGKILL)
"""
        with pytest.raises(AssertionError, match="ended with -9"):
            race(code, 1, str(tier.root))
        assert tier.get("job/kept") == b"x" * 2**21


class _Plain(MemoryTier):
    """A correct tier without create-only put."""

    capabilities = Capabilities(create_only_put=False, range_read=False, survives_process=False, survives_node=False)

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        if create_only:
            raise StoreError("this tier has no create-only put")
        super().put(key, data, pace=pace)


class TestPlainTier(TierSuite):
    """A tier that can do less, and says so, keeps the contract too."""

    @pytest.fixture
    def tier(self) -> _Plain:
        """An empty tier without create-only put."""
        return _Plain()


class _Pretending(_Plain):
    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        if create_only and key in self.objects:
            raise FencedError(f"{key} exists")
        super().put(key, data)


class _CheckThenWrite(MemoryTier):
    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        if create_only:
            exists = key in self.objects
            time.sleep(0.002)  # time for another thread between the check and the write
            if exists:
                raise FencedError(f"{key} exists")
        super().put(key, data)


class _Borrowing(MemoryTier):
    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        super().put(key, b"", create_only=create_only)
        self.objects[key] = (data, self.objects[key][1])  # type: ignore[assignment]


class _ShortReading(MemoryTier):
    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        part = self.get(key)[offset : offset + len(into)]
        into[: len(part)] = part


class _FolderListing(MemoryTier):
    def list(self, prefix: str) -> Iterator[Entry]:
        folder = prefix.rpartition("/")[0]
        return (entry for entry in super().list("") if entry.key.startswith(folder))


class _StrictDeleting(MemoryTier):
    def delete(self, key: str) -> None:
        if key not in self.objects:
            raise NotFoundError(f"no object {key}")
        super().delete(key)


class _Tearing(MemoryTier):
    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        whole = b"".join(buffers(data))
        super().put(key, whole[: len(whole) // 2], create_only=create_only)
        time.sleep(0.002)  # time for a reader
        super().put(key, data)


class _FirstBufferOnly(MemoryTier):
    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        super().put(key, buffers(data)[:1], create_only=create_only, pace=pace)


class _Unpaced(MemoryTier):
    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        super().put(key, data, create_only=create_only)


class _OpeningToWrite(MemoryTier):
    def open(self, key: str) -> int:
        descriptor = super().open(key)
        try:
            return os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.close(descriptor)


class _Leaving(MemoryTier):
    def check_writable(self) -> None:
        self.put("probe", b"")


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (_Pretending, "test_does_not_pretend_to_create_only"),
        (_CheckThenWrite, "test_create_only_has_one_winner"),
        (_Borrowing, "test_keeps_no_reference"),
        (_ShortReading, "test_a_range_behind_the_end_is_damage"),
        (_FolderListing, "test_lists_by_prefix"),
        (_StrictDeleting, "test_deleting_nothing_is_no_error"),
        (_Tearing, "test_is_seen_whole_or_not_at_all"),
        (_FirstBufferOnly, "test_puts_several_buffers_as_one"),
        (_Unpaced, "test_asks_before_it_moves"),
        (_OpeningToWrite, "test_opens_for_reading"),
        (_Leaving, "test_says_that_it_is_writable"),
    ],
)
def test_suite_catches(broken: type[MemoryTier], test: str) -> None:
    """The suite fails a tier that breaks the contract in a typical way, in the test that names it."""
    with pytest.raises((AssertionError, NotFoundError)):
        getattr(TierSuite(), test)(broken())


def test_suite_skips_what_is_not_declared() -> None:
    """What a tier does not declare is skipped with a reason, not passed over."""
    with pytest.raises(SkipTest, match="no create-only put"):
        TierSuite().test_create_only_has_one_winner(_Plain())
