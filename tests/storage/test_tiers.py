"""The conformance suite, run on the tiers that ship in the core, and on broken tiers that it must catch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, ClassVar
from unittest import SkipTest

import pytest

from ckptd.errors import DamagedError, FencedError, NotFoundError, StoreError
from ckptd.storage.local import LocalTier
from ckptd.storage.memory import MemoryTier
from ckptd.storage.stream import piece, stream_of
from ckptd.storage.tier import Cost, Data, Entry, Pace, Tier
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
        assert isinstance(tier, LocalTier)
        return type(tier)(tier.root)

    def litter(self, tier: Tier) -> bool:
        code = """
import os, signal
from pathlib import Path
from ckptd.storage.local import LocalTier
class Deadly:
    size_bytes = 2**21
    def read_into(self, offset, into):
        os.kill(os.getpid(), signal.SIGKILL)
ready()
LocalTier(Path(sys.argv[2])).put("job/s1/killed", Deadly())
"""
        with pytest.raises(AssertionError, match="ended with -9"):
            race(code, 1, tier.url)
        return True

    def holder(self, tier: Tier, job: str) -> subprocess.Popen[bytes]:
        code = """
import sys, time
from ckptd_plugins.storage_local import open_local
tier = open_local(sys.argv[1], {})
tier.hold(sys.argv[2], 0)
print("held", flush=True)
time.sleep(600)
"""
        return subprocess.Popen([sys.executable, "-c", code, tier.url, job], stdout=subprocess.PIPE)

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

    capabilities = replace(MemoryTier.capabilities, create_only_put=False, range_read=False)

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


class _LookThenWrite(MemoryTier):
    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        if create_only and key in self.objects:
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
        stream = stream_of(data)
        whole = bytes(piece(stream, 0, stream.size_bytes))
        super().put(key, whole[: len(whole) // 2], create_only=create_only)
        time.sleep(0.002)  # time for a reader
        super().put(key, data)


class _FirstBufferOnly(MemoryTier):
    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        first = data if isinstance(data, bytes | memoryview) else list(data)[:1]
        super().put(key, first, create_only=create_only, pace=pace)


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


class _DeletingFirst(MemoryTier):
    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        self.delete(key)
        time.sleep(0.002)  # time for a reader
        super().put(key, data, create_only=create_only, pace=pace)


class _RepeatingPieces(MemoryTier):
    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        stream, step = stream_of(data), 4 * 2**20
        pieces = [bytes(piece(stream, 0, min(step, stream.size_bytes))) for _ in range(0, stream.size_bytes, step)]
        super().put(key, pieces, create_only=create_only, pace=pace)


class _SharingScratch(MemoryTier):
    def __init__(self) -> None:
        super().__init__()
        self.scratch = bytearray(16 * 2**20)

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        stream = stream_of(data)
        room = memoryview(self.scratch)[: stream.size_bytes]
        stream.read_into(0, room)
        time.sleep(0.002)  # time for another put
        super().put(key, room, create_only=create_only, pace=pace)


class _ClaimingNothing(MemoryTier):
    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        buffers = isinstance(data, bytes | memoryview | list)
        super().put(key, data if buffers or not create_only else b"", create_only=create_only, pace=pace)


class _ReadingWhole(MemoryTier):
    capabilities = replace(MemoryTier.capabilities, multipart=True)


class _KeepingHalf(MemoryTier):
    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        stream = stream_of(data)
        try:
            super().put(key, data, create_only=create_only, pace=pace)
        except DamagedError:
            super().put(key, bytes(stream.size_bytes // 2))
            raise


class _Rewording(MemoryTier):
    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        try:
            super().put(key, data, create_only=create_only, pace=pace)
        except DamagedError as error:
            raise DamagedError(f"can't put {key}") from error


class _Contradicting(MemoryTier):
    capabilities = replace(MemoryTier.capabilities, cost=Cost.DISK)


class _Untyped(MemoryTier):
    capabilities = replace(MemoryTier.capabilities, failure_group="process")


class _LendingCopies(MemoryTier):
    capabilities = replace(MemoryTier.capabilities, lends_files=True)


class _SweepingObjects(MemoryTier):
    def sweep(self, prefix: str, older_than_s: float) -> list[str]:
        gone = [key for key in self.objects if key.startswith(prefix)]
        for key in gone:
            del self.objects[key]
        return gone


class _NeverSweeping(LocalTier):
    def sweep(self, prefix: str, older_than_s: float) -> list[str]:
        return []


class _SweepingAtOnce(LocalTier):
    def sweep(self, prefix: str, older_than_s: float) -> Sequence[str]:
        return super().sweep(prefix, 0.0)


class _SweepingEverywhere(LocalTier):
    def sweep(self, prefix: str, older_than_s: float) -> Sequence[str]:
        return super().sweep("", older_than_s)


class _ForgettingAtClose(LocalTier):
    def close(self) -> None:
        for entry in list(self.list("")):
            self.delete(entry.key)
        super().close()


class _HoldingOn(LocalTier):
    held: ClassVar[list[IO[bytes]]] = []

    def close(self) -> None:
        self.held.append((self.root / "job/a").open("rb"))
        super().close()


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (_Pretending, "test_does_not_pretend_to_create_only"),
        (_CheckThenWrite, "test_create_only_has_one_winner"),
        (_LookThenWrite, "test_create_only_has_one_winner"),
        (_Borrowing, "test_keeps_no_reference"),
        (_ShortReading, "test_a_range_behind_the_end_is_damage"),
        (_FolderListing, "test_lists_by_prefix"),
        (_StrictDeleting, "test_deleting_nothing_is_no_error"),
        (_Tearing, "test_is_seen_whole_or_not_at_all"),
        (_DeletingFirst, "test_replaces_at_once"),
        (_FirstBufferOnly, "test_puts_several_buffers_as_one"),
        (_Unpaced, "test_asks_before_it_moves"),
        (_OpeningToWrite, "test_opens_for_reading"),
        (_Leaving, "test_says_that_it_is_writable"),
        (_Unpaced, "test_puts_streams"),
        (_RepeatingPieces, "test_puts_streams"),
        (_SharingScratch, "test_puts_streams_from_many_threads"),
        (_ClaimingNothing, "test_claims_with_a_stream"),
        (_ReadingWhole, "test_puts_large_streams_in_parts"),
        (_KeepingHalf, "test_a_damaged_stream_puts_nothing"),
        (_Rewording, "test_a_damaged_stream_puts_nothing"),
        (_Contradicting, "test_capabilities_fit_each_other"),
        (_Untyped, "test_capabilities_fit_each_other"),
        (_LendingCopies, "test_lends_what_it_says"),
        (_SweepingObjects, "test_sweeps_no_object"),
    ],
)
def test_suite_catches(broken: type[MemoryTier], test: str) -> None:
    """The suite fails a tier that breaks the contract in a typical way, in the test that names it."""
    with pytest.raises((AssertionError, NotFoundError)):
        getattr(TierSuite(), test)(broken())


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (_NeverSweeping, "test_sweeps_what_killed_puts_leave"),
        (_SweepingAtOnce, "test_sweeps_what_killed_puts_leave"),
        (_SweepingEverywhere, "test_sweeps_what_killed_puts_leave"),
        (_ForgettingAtClose, "test_closes_after_work"),
        (_HoldingOn, "test_lets_go_of_what_it_holds"),
    ],
)
def test_suite_catches_on_disk(
    broken: type[LocalTier], test: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suite fails a tier that leaves too much, lets go of too much or too little."""
    monkeypatch.setattr("ckptd.testing.tier_streams._PATIENCE_S", 0.1)
    try:
        with pytest.raises(AssertionError):
            getattr(TestLocalTier(), test)(broken(tmp_path))
    finally:
        while _HoldingOn.held:
            _HoldingOn.held.pop().close()


def test_suite_skips_what_is_not_declared() -> None:
    """What a tier does not declare is skipped with a reason, not passed over."""
    with pytest.raises(SkipTest, match="no create-only put"):
        TierSuite().test_create_only_has_one_winner(_Plain())
