"""Spares when something goes wrong, and when several processes and threads share them."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptd.errors import StoreError
from ckptd.storage.local import LocalTier
from ckptd.testing import race
from tests.storage.files import aligned, files_below
from tests.storage.spared import MIB, identity, skip_without_spares, spare_sizes, with_a_spare


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    """A local tier on a filesystem where spares are kept."""
    skip_without_spares(tmp_path)
    return LocalTier(tmp_path / "store")


# --- what goes wrong --------------------------------------------------------------------------------------------


def test_a_spare_that_is_gone_is_not_missed(tier: LocalTier) -> None:
    """When somebody took or removed the spare, or its folder, puts and deletes go on with new files."""
    with_a_spare(tier)
    shutil.rmtree(tier.root / ".tmp-spares")
    tier.put("job/s3/a", aligned(2 * MIB, b"3"))
    assert tier.get("job/s3/a") == b"3" * 2 * MIB
    (tier.root / ".tmp-spares").write_bytes(b"in the way")
    tier.delete("job/s3/a")
    assert files_below(tier.root) == {"job/s2/a", ".tmp-spares"}


def test_a_failed_write_leaves_no_spare(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A put that fails while it writes over a spare leaves neither an object nor the spare."""
    with_a_spare(tier)

    def failing(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(StoreError, match="Input/output error"):
        tier.put("job/s3/a", aligned(2 * MIB))
    assert files_below(tier.root) == {"job/s2/a"}


def test_a_rename_that_may_not_last_makes_no_spare(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the folder that the file left can't be synced the delete fails, and the file is never written over."""
    for step in (1, 2):
        tier.put(f"job/s{step}/a", aligned(2 * MIB))
    real = os.fsync

    def failing(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/job/s1"):
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StoreError, match="Input/output error"):
        tier.delete("job/s1/a")
    assert files_below(tier.root) == {"job/s2/a"}


_FILL = """
import os, sys
from pathlib import Path
from ckptd.errors import StoreError
from ckptd.storage.local import LocalTier
MIB = 2**20
tier = LocalTier(Path(sys.argv[1]) / "store")
def fill(leaving):
    free = os.statvfs(sys.argv[1]).f_bavail * os.statvfs(sys.argv[1]).f_frsize
    descriptor = os.open(f"{sys.argv[1]}/filling", os.O_WRONLY | os.O_CREAT)
    size = os.fstat(descriptor).st_size
    os.posix_fallocate(descriptor, size, free - leaving)
    os.close(descriptor)
def have_a_spare(step):
    for number in (step, step + 1):
        tier.put(f"job/s{number}/a", b"x" * 4 * MIB)
    tier.delete(f"job/s{step}/a")
    assert len(list((tier.root / ".tmp-spares").iterdir())) == 1
def check_no_spare():
    assert not list(tier.root.rglob(".tmp-*/*"))
have_a_spare(1)
fill(MIB)
tier.put("job/large", b"l" * (2 * MIB - 4096))
check_no_spare()
assert tier.get("job/large") == b"l" * (2 * MIB - 4096)
os.unlink(f"{sys.argv[1]}/filling")
have_a_spare(3)
fill(4096 * 4)
tier.put("job/small", b"s" * 100_000)
check_no_spare()
os.unlink(f"{sys.argv[1]}/filling")
have_a_spare(5)
fill(MIB)
try:
    tier.put("job/longer", b"l" * 7 * MIB)
except StoreError as error:
    assert "No space left" in error.message
else:
    assert False, "it can't fit"
check_no_spare()
assert not (tier.root / "job/longer").exists()
"""


def test_spares_give_way_on_a_full_disk(tmp_path: Path) -> None:
    """On a real filesystem without room an object takes the place of the spares: no put fails because of them."""
    if os.getuid() != 0 or not (shutil.which("unshare") and shutil.which("mkfs.ext4")):
        pytest.skip("no filesystem can be made here")
    disk, mounted = tmp_path / "disk", tmp_path / "mounted"
    mounted.mkdir()
    with disk.open("wb") as file:
        file.truncate(32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(disk)], check=True)
    # In a mount namespace of its own: whatever happens, the mount ends with the process.
    script = 'mount -o loop "$1" "$2" || exit 77; exec "$3" -c "$4" "$2"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(disk), str(mounted), sys.executable, _FILL],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip(f"no filesystem can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


# --- several processes and threads ------------------------------------------------------------------------------


def test_what_an_earlier_process_left_is_removed(tier: LocalTier) -> None:
    """The first large put of a process removes spares that nobody will take any more; small ones leave them alone."""
    with_a_spare(tier)
    other = LocalTier(tier.root)
    other.put("job/small", b"x")
    assert len(spare_sizes(tier)) == 1
    other.put("job/s3/a", aligned(2 * MIB, b"3"))
    assert spare_sizes(tier) == []
    tier.put("job/s4/a", aligned(2 * MIB, b"4"))  # the spare that it knows of is gone
    assert [tier.get(f"job/s{step}/a")[:1] for step in (2, 3, 4)] == [b"2", b"3", b"4"]


_ENDING = """
import os, signal, sys
from pathlib import Path
from ckptd.storage.local import LocalTier
tier = LocalTier(Path(sys.argv[1]))
for step in (1, 2):
    tier.put(f"job/s{step}/a", b"x" * 2**21)
tier.delete("job/s1/a")
assert len(list((tier.root / ".tmp-spares").iterdir())) == 1
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("end", "left"), [("exit", []), ("kill", [2 * MIB])])
def test_a_process_that_ends_leaves_no_spare(tier: LocalTier, end: str, left: list[int]) -> None:
    """A process that ends gives its spares back, with their folder; only one that is killed leaves them."""
    subprocess.run([sys.executable, "-c", _ENDING, str(tier.root), end], check=False)
    assert spare_sizes(tier) == left
    assert (tier.root / ".tmp-spares").exists() == bool(left)
    assert tier.size_bytes("job/s2/a") == 2 * MIB


def test_the_spares_of_others_stay(tier: LocalTier) -> None:
    """A tier that ends deletes its own spares, not those of another that shares the folder."""
    with_a_spare(tier)
    other = LocalTier(tier.root)
    other.list("")
    del other
    assert spare_sizes(tier) == [2 * MIB]


def test_processes_that_share_a_store(tier: LocalTier) -> None:
    """Processes that put, prune and remove each other's spares in one folder each read back what they wrote."""
    code = """
from pathlib import Path
from ckptd.storage.local import LocalTier
number, root = sys.argv[1:]
tier = LocalTier(Path(root))
ready()
for step in range(12):
    if step % 5 == 4:
        tier._spares.remove()
    tier.put(f"job-{number}/s{step}/a", f"{number}{step % 10}".encode() * 2**20)
    for back in range(min(step, 2)):
        found = tier.get(f"job-{number}/s{step - back}/a")
        assert found == f"{number}{(step - back) % 10}".encode() * 2**20, f"step {step - back} is not its own"
    if step >= 2:
        tier.delete(f"job-{number}/s{step - 2}/a")
"""
    race(code, 4, str(tier.root))


def test_threads_that_put_and_delete_at_once(tier: LocalTier) -> None:
    """Whatever meets whatever, each object is its own, and no more spares are kept than one folder had files."""
    taken: set[tuple[int, int]] = set()
    lock = threading.Lock()

    def work(rank: int) -> None:
        for step in range(8):
            tier.put(f"job/s{step}/r{rank}", aligned(MIB + 4096 * rank, b"%d" % (rank + step)))
            if step:
                assert tier.get(f"job/s{step - 1}/r{rank}") == b"%d" % (rank + step - 1) * (MIB + 4096 * rank)
                found = identity(tier, f"job/s{step - 1}/r{rank}")
                tier.delete(f"job/s{step - 1}/r{rank}")
                with lock:
                    taken.add(found)

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(work, rank) for rank in range(3)]:
            done.result()
    assert len(spare_sizes(tier)) <= 3
    assert len(taken) < 21, "no file was written over"


def test_deletes_that_meet_keep_no_more(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that delete at the same moment, each with the last room there is, keep one file."""
    for step in range(3):
        tier.put(f"job/s{step}/a", aligned(MIB))
    both, real = threading.Barrier(2, timeout=30), os.fsync

    def meeting(descriptor: int) -> None:
        if "/job/s" in os.readlink(f"/proc/self/fd/{descriptor}"):
            both.wait()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", meeting)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(tier.delete, f"job/s{step}/a") for step in (0, 1)]:
            done.result()
    assert spare_sizes(tier) == [MIB]
    assert files_below(tier.root / "job") == {"s2/a"}


def test_no_listing_shows_spares(tier: LocalTier) -> None:
    """Spares are no objects, a probe passes beside them, and the folders of what was deleted are gone."""
    with_a_spare(tier)
    assert [entry.key for prefix in ("", ".tmp", ".tmp-spares/") for entry in tier.list(prefix)] == ["job/s2/a"]
    tier.check_writable()
    assert not (tier.root / "job/s1").exists()
    tier.delete("job/s2/a")
    assert [path.name for path in tier.root.iterdir()] == [".tmp-spares"]
