"""Files that are deleted and written over by the next put: when that is done, and that nobody ever sees it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.storage import spares
from ckptd.storage.local import LocalTier
from ckptd.storage.spares import closest
from tests.storage.files import aligned, files_below, pattern
from tests.storage.spared import MIB, identity, skip_without_spares, spare_sizes, with_a_spare


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    """A local tier on a filesystem where spares are kept."""
    skip_without_spares(tmp_path)
    return LocalTier(tmp_path / "store")


# --- what is kept -----------------------------------------------------------------------------------------------


def test_two_ranks_write_over_what_was_pruned(tier: LocalTier) -> None:
    """After the first checkpoints every file is written over one that was pruned, and holds just its own bytes."""
    files: dict[int, set[tuple[int, int]]] = {}
    for step in range(7):
        sizes = [2 * MIB + 4096 * (step % 3), 3 * MIB - 4096 * (step % 2)]
        with ThreadPoolExecutor(2) as pool:
            puts = [
                pool.submit(tier.put, f"job/s{step}/r{rank}", aligned(size, b"%d" % step))
                for rank, size in enumerate(sizes)
            ]
        assert [put.result() for put in puts] == [None, None]
        files[step] = {identity(tier, f"job/s{step}/r{rank}") for rank in range(2)}
        assert [tier.get(f"job/s{step}/r{rank}") for rank in range(2)] == [b"%d" % step * size for size in sizes]
        assert spare_sizes(tier) == []
        if step >= 2:
            for rank in range(2):
                tier.delete(f"job/s{step - 2}/r{rank}")
            assert len(spare_sizes(tier)) == 2
    assert [files[step] for step in (3, 4, 5, 6)] == [files[step] for step in (0, 1, 2, 3)]


def test_a_process_that_only_prunes_keeps_nothing(tier: LocalTier) -> None:
    """What `ckptctl prune` deletes is gone: only a tier that puts large objects keeps spares."""
    for step in range(3):
        tier.put(f"job/s{step}/a", aligned(2 * MIB))
    other = LocalTier(tier.root)
    other.put("job/small", b"x")
    other.delete("job/s0/a")
    assert files_below(tier.root) == {"job/s1/a", "job/s2/a", "job/small"}


def test_no_more_is_kept_than_one_checkpoint_has(tier: LocalTier) -> None:
    """Of many files that are pruned at once as many stay, and as many bytes, as were put to one folder."""
    for step in range(5):
        for rank in range(2):
            tier.put(f"job/s{step}/r{rank}", aligned(2 * MIB))
    tier.put("job/s5/small", aligned(MIB))
    for step in range(4):
        for rank in range(2):
            tier.delete(f"job/s{step}/r{rank}")
    assert spare_sizes(tier) == [2 * MIB, 2 * MIB]


def test_bytes_are_bounded_too(tier: LocalTier) -> None:
    """A file that is larger than all that this tier has put to one folder is deleted, though it is just one."""
    LocalTier(tier.root).put("job/s0/a", aligned(4 * MIB))
    tier.put("job/s1/a", aligned(2 * MIB))
    tier.delete("job/s0/a")
    assert spare_sizes(tier) == []
    tier.put("job/s2/a", aligned(4 * MIB))
    tier.delete("job/s2/a")
    assert spare_sizes(tier) == [4 * MIB]


def test_spares_follow_the_size_of_checkpoints(tier: LocalTier) -> None:
    """When checkpoints become much smaller, spares that fit nothing any more make room for those that do."""
    for step in range(2):
        tier.put(f"job/s{step}/a", aligned(16 * MIB))
    for step in range(2):
        tier.delete(f"job/s{step}/a")
    for step in range(2, 14):
        tier.put(f"job/s{step}/a", aligned(4 * MIB))
        if step > 2:
            tier.delete(f"job/s{step - 1}/a")
    assert spare_sizes(tier) == [4 * MIB]


def test_files_are_bounded_too(tier: LocalTier) -> None:
    """Of many small files that one large one would have room for as many are kept as were put to one folder."""
    for step, size in enumerate((4 * MIB, MIB, MIB, MIB)):
        tier.put(f"job/s{step}/a", aligned(size))
    for step in (1, 2, 3):
        tier.delete(f"job/s{step}/a")
    assert spare_sizes(tier) == [MIB]


def test_what_a_put_would_not_have_made_is_not_kept(tier: LocalTier) -> None:
    """Small files, links, and files with a mode of their own are deleted: the next object must not inherit that."""
    tier.put("job/s1/a", aligned(2 * MIB))
    tier.put("job/small", b"x" * 1000)
    (tier.root / "job/link").symlink_to(tier.root / "job/s1/a")
    tier.put("job/private", aligned(MIB))
    (tier.root / "job/private").chmod(0o600)
    for key in ("small", "link", "private"):
        tier.delete(f"job/{key}")
    assert files_below(tier.root) == {"job/s1/a"}


def test_other_filesystems_keep_nothing(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another machine may have the file open, which no lease tells, it is deleted."""
    monkeypatch.setattr(spares, "_OF_ONE_MACHINE", frozenset())
    for step in (1, 2):
        tier.put(f"job/s{step}/a", aligned(2 * MIB))
    tier.delete("job/s1/a")
    assert files_below(tier.root) == {"job/s2/a"}


def test_the_filesystem_is_known_by_its_type(tmp_path: Path) -> None:
    """The types of filesystems are the kernel's: /proc is none that keeps spares, what isn't there has none."""
    assert spares._filesystem(Path("/proc")) == 0x9FA0
    assert spares._filesystem(tmp_path / "missing") is None


# --- which one is taken -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "wanted", "found"),
    [
        ([], 100, None),
        ([100], 100, "0"),
        ([90, 100, 110], 101, "1"),
        ([50], 100, "0"),
        ([49], 100, None),
        ([200], 100, "0"),
        ([201], 100, None),
        ([201, 49, 60], 100, "2"),
    ],
)
def test_the_closest_size_is_taken(sizes: list[int], wanted: int, found: str | None) -> None:
    """The spare that needs least cutting or adding is taken, and none of another order of size."""
    assert closest({str(number): size for number, size in enumerate(sizes)}, wanted) == found


@given(st.integers(MIB, 3 * MIB), st.integers(MIB, 3 * MIB))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_of_the_old_file_is_left(tier: LocalTier, old: int, new: int) -> None:
    """Whatever the sizes, the object is just what was put: shorter, longer, with no whole number of blocks."""
    with_a_spare(tier, aligned(old, b"o"))
    data = pattern(new)
    tier.put("job/s3/a", data)
    path = tier.root / "job/s3/a"
    assert path.read_bytes() == data
    assert path.stat().st_blocks * 512 <= new + 64 * 1024, "blocks of the old file are behind the end"
    for key in ("job/s2/a", "job/s3/a"):
        tier.delete(key)
    tier._spares.remove()


# --- readers ----------------------------------------------------------------------------------------------------


@contextmanager
def _open(path: Path) -> Iterator[Callable[[], bytes]]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield lambda: os.pread(descriptor, 2 * MIB, 0)
    finally:
        os.close(descriptor)


@contextmanager
def _mapped(path: Path) -> Iterator[Callable[[], bytes]]:
    descriptor = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(descriptor, 2 * MIB, prot=mmap.PROT_READ)
    os.close(descriptor)
    with mapped:
        yield lambda: mapped[:]


@contextmanager
def _on_its_way(path: Path) -> Iterator[Callable[[], bytes]]:
    """Sent to another process, which has not received it, and closed."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        descriptor = os.open(path, os.O_RDONLY)
        socket.send_fds(ours, [b"x"], [descriptor])
        os.close(descriptor)

        def receive() -> bytes:
            (found,) = socket.recv_fds(theirs, 1, 1)[1]
            with os.fdopen(found, "rb") as file:
                return file.read()

        yield receive


@contextmanager
def _in_another_process(path: Path) -> Iterator[Callable[[], bytes]]:
    code = "import sys; f = open(sys.argv[1], 'rb'); print(flush=True); input(); sys.stdout.buffer.write(f.read())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == b"\n"
    try:
        yield lambda: process.communicate(b"\n")[0]
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _with_another_name(path: Path) -> Iterator[Callable[[], bytes]]:
    copy = path.parents[3] / "copy"
    copy.hardlink_to(path)
    yield copy.read_bytes
    copy.unlink()


_HOLDERS = [_open, _mapped, _on_its_way, _in_another_process, _with_another_name]


@pytest.mark.parametrize("hold", _HOLDERS)
def test_a_file_that_somebody_has_is_never_written(
    tier: LocalTier, hold: Callable[[Path], AbstractContextManager[Callable[[], bytes]]]
) -> None:
    """Whoever has a file open, mapped, on its way in a socket or under another name keeps its bytes."""
    for key in ("job/s1/a", "job/s2/a"):
        tier.put(key, aligned(2 * MIB, b"1"))
    held = identity(tier, "job/s1/a")
    with hold(tier.root / "job/s1/a") as read:
        tier.delete("job/s1/a")
        tier.put("job/s3/a", aligned(2 * MIB, b"3"))
        assert identity(tier, "job/s3/a") != held
        assert read() == b"1" * 2 * MIB
    assert tier.get("job/s3/a") == b"3" * 2 * MIB
    assert files_below(tier.root) == {"job/s2/a", "job/s3/a"}


@pytest.mark.parametrize("hold", [_open, _mapped, _in_another_process])
def test_a_reader_that_has_ended_is_no_hindrance(
    tier: LocalTier, hold: Callable[[Path], AbstractContextManager[Callable[[], bytes]]]
) -> None:
    """A file that was read until after its deletion is written over once nobody reads it any more."""
    for key in ("job/s1/a", "job/s2/a"):
        tier.put(key, aligned(2 * MIB, b"1"))
    spare = identity(tier, "job/s1/a")
    with hold(tier.root / "job/s1/a"):
        tier.delete("job/s1/a")
    tier.put("job/s3/a", aligned(2 * MIB, b"3"))
    assert identity(tier, "job/s3/a") == spare


def test_a_lease_that_is_called_back_kills_nobody(tier: LocalTier) -> None:
    """Somebody who opens the file while it is looked at makes the kernel send a signal, which has no effect."""
    code = """
import os, sys
from pathlib import Path
from ckptd.storage.local import LocalTier
tier, refused = LocalTier(Path(sys.argv[1])), []
real = os.fstat
def meeting_a_reader(descriptor):
    try:
        os.close(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_NONBLOCK))
    except BlockingIOError:
        refused.append(descriptor)
    return real(descriptor)
for step in (1, 2, 3):
    if step == 3:
        tier.delete("job/s1/a")
        os.fstat = meeting_a_reader
    tier.put(f"job/s{step}/a", b"x" * 2**21)
assert refused, "the file was not opened under the lease"
"""
    subprocess.run([sys.executable, "-c", code, str(tier.root)], check=True)


def test_no_lease_outlasts_the_look(tier: LocalTier) -> None:
    """The lease is given back before the file is written: a process forked meanwhile would hold it for good."""
    with_a_spare(tier)
    descriptor = tier._spares.take(tier.root / "taken", 2 * MIB)
    assert descriptor is not None
    assert fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_UNLCK
    os.close(descriptor)


def test_a_filesystem_without_leases(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the kernel gives no lease, for whatever reason, a new file is written and the spare is deleted."""
    real = fcntl.fcntl

    def refusing(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETLEASE:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, command, argument)

    old = with_a_spare(tier)
    monkeypatch.setattr(fcntl, "fcntl", refusing)
    tier.put("job/s3/a", aligned(2 * MIB, b"3"))
    assert identity(tier, "job/s3/a") != old
    assert tier.get("job/s3/a") == b"3" * 2 * MIB
    assert files_below(tier.root) == {"job/s2/a", "job/s3/a"}
