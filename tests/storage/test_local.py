"""What is particular to the local tier: direct and buffered writes, temporary files, full disks, foreign folders."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ckptd.errors import DamagedError, FencedError, NotFoundError, StoreError
from ckptd.storage import local
from ckptd.storage.local import LocalTier

DIRECT_BYTES = 2**20


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    """A local tier in a folder that does not exist yet."""
    return LocalTier(tmp_path / "store")


@pytest.fixture
def flags_used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every file that was opened for data, with its flags, while the real calls go on."""
    used: list[tuple[str, int]] = []
    real = os.open

    def recording(path: str | Path, flags: int, mode: int = 0o777, **more: int) -> int:
        if not flags & os.O_DIRECTORY:
            used.append((Path(path).name, flags))
        return real(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", recording)
    return used


def aligned(size: int, filling: bytes = b"d") -> memoryview:
    """Memory that begins on a page, as slots do."""
    view = memoryview(mmap.mmap(-1, size))
    view[:] = filling * size
    return view


def files_below(folder: Path) -> set[str]:
    """Every file below a folder, whatever its name."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


# --- direct and buffered ----------------------------------------------------------------------------------------


def test_a_large_aligned_image_goes_past_the_page_cache(tier: LocalTier, flags_used: list[tuple[str, int]]) -> None:
    """A whole number of blocks in page-aligned memory is opened with O_DIRECT, once, for writing and for reading."""
    tier.put("job/before", b"x")
    try:
        os.close(os.open(tier.root / "job/before", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this filesystem has no O_DIRECT")
    flags_used.clear()
    tier.put("job/image", aligned(DIRECT_BYTES))
    into = aligned(DIRECT_BYTES, b"\0")
    tier.read_into("job/image", 0, into)
    assert into == aligned(DIRECT_BYTES)
    assert [bool(flags & os.O_DIRECT) for _, flags in flags_used] == [True, True]


@pytest.mark.parametrize("size", [10, DIRECT_BYTES - 4096, DIRECT_BYTES + 1, 3 * DIRECT_BYTES - 1])
def test_other_sizes_are_written_buffered(tier: LocalTier, flags_used: list[tuple[str, int]], size: int) -> None:
    """Small objects, and those that are no whole number of blocks, are never tried with O_DIRECT."""
    tier.put("job/object", b"b" * size)
    into = memoryview(bytearray(size))
    tier.read_into("job/object", 0, into)
    assert into == b"b" * size
    assert not any(flags & os.O_DIRECT for _, flags in flags_used)


def test_memory_that_is_not_aligned_falls_back(tier: LocalTier) -> None:
    """A view that begins anywhere is written and read whole, where the filesystem refuses it with O_DIRECT."""
    data = memoryview(b"x" + b"u" * DIRECT_BYTES)[1:]
    tier.put("job/unaligned", data)
    room = memoryview(bytearray(DIRECT_BYTES + 3))[3:]
    tier.read_into("job/unaligned", 0, room)
    assert room == data


@pytest.mark.parametrize("refused", ["open", "pwrite"])
def test_a_filesystem_that_refuses_direct_io_gets_buffered_writes(
    tier: LocalTier, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """EINVAL from opening or from the first direct write leads to a buffered write, still with its fsync."""
    direct: set[int] = set()
    synced: list[int] = []
    real_open, real_pwrite, real_fsync = os.open, os.pwrite, os.fsync

    def opening(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT and refused == "open":
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        descriptor = real_open(path, flags & ~os.O_DIRECT, mode)
        (direct.add if flags & os.O_DIRECT else direct.discard)(descriptor)
        return descriptor

    def writing(descriptor: int, data: memoryview, offset: int) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "another alignment, please")
        return real_pwrite(descriptor, data, offset)

    def syncing(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        real_fsync(descriptor)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "pwrite", writing)
    monkeypatch.setattr(os, "fsync", syncing)
    tier.put("job/image", aligned(DIRECT_BYTES))
    assert DIRECT_BYTES in synced
    monkeypatch.undo()
    assert tier.get("job/image") == b"d" * DIRECT_BYTES


def test_another_error_of_a_direct_write_is_not_hidden(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO is reported as a `StoreError` with its hint, never answered by trying again without O_DIRECT."""
    calls: list[int] = []

    def failing(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(StoreError, match="Input/output error") as caught:
        tier.put("job/image", aligned(DIRECT_BYTES))
    assert caught.value.hint == "the disk reports errors: look into the kernel's log"
    assert len(calls) == 1
    assert files_below(tier.root) == set()


def test_short_writes_are_continued(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes only a part of a write gets the rest in further calls."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:1000], offset))
    tier.put("job/object", b"".join(b"%07d\n" % number for number in range(2000)))
    assert tier.get("job/object").splitlines()[-1] == b"0001999"


def test_a_failed_fsync_fails_the_put(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk says that it could not keep the bytes, no object appears."""
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(StoreError):
        tier.put("object", b"x" * 5000)
    assert files_below(tier.root) == set()


def test_a_truncated_file_is_damage_for_direct_reads_too(tier: LocalTier) -> None:
    """A file cut in the middle of a block is noticed by the O_DIRECT read, which says where it ends."""
    tier.put("job/image", aligned(2 * DIRECT_BYTES))
    os.truncate(tier.root / "job/image", DIRECT_BYTES + 5000)
    with pytest.raises(DamagedError, match=f"ends at byte {DIRECT_BYTES + 5000}"):
        tier.read_into("job/image", 0, aligned(2 * DIRECT_BYTES))


# --- temporary files --------------------------------------------------------------------------------------------


def test_a_temporary_file_is_nobodys_object(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """While an object is being written no listing shows it, and afterwards nothing temporary is left."""
    seen: list[list[str]] = []
    real = os.pwrite

    def looking(descriptor: int, data: memoryview, offset: int) -> int:
        seen.append([entry.key for prefix in ("", "job/", "job/.tmp-") for entry in tier.list(prefix)])
        assert any(".tmp-" in name for name in files_below(tier.root)), "the test looks at the wrong moment"
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", looking)
    tier.put("job/object", b"x")
    assert seen == [[]]
    assert files_below(tier.root) == {"job/object"}


def test_what_a_killed_writer_left_is_not_listed(tier: LocalTier) -> None:
    """The temporary file of a process killed in the middle of a put is never an object, and does not block the next."""
    code = """
import os, signal, sys
from pathlib import Path
from ckptd.storage.local import LocalTier
real = os.pwrite
def dying(descriptor, data, offset):
    real(descriptor, data[:10], offset)
    os.kill(os.getpid(), signal.SIGKILL)
os.pwrite = dying
LocalTier(Path(sys.argv[1])).put("job/object", b"x" * 100)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tier.root)], check=False).returncode == -9
    assert len(files_below(tier.root)) == 1
    assert list(tier.list("")) == []
    tier.put("job/object", b"new", create_only=True)
    assert [entry.key for entry in tier.list("")] == ["job/object"]


def test_every_writer_has_a_temporary_name_of_its_own(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes that share the folder, where process and thread have the same numbers, don't write one file."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(threading, "get_native_id", lambda: 7)
    names: set[str] = set()
    real = os.pwrite

    def noting(descriptor: int, data: memoryview, offset: int) -> int:
        names.update(files_below(tier.root))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", noting)
    tier.put("object", b"1")
    tier.delete("object")
    tier.put("object", b"2")
    assert len(names) == 2


# --- full disks -------------------------------------------------------------------------------------------------

_FILL = """
import json, mmap, os, resource, sys
from pathlib import Path
from ckptd.errors import StoreError
from ckptd.storage.local import LocalTier
root, how = sys.argv[1:]
tier = LocalTier(Path(root))
tier.put("job/before", b"b" * 1000)
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))
found = []
for size, create_only in ((900_000, False), (900_001, True), (2 * 2**20, False)):
    image = memoryview(mmap.mmap(-1, size))  # page-aligned: the last one goes with O_DIRECT where that is possible
    try:
        tier.put("job/new", image, create_only=create_only)
    except StoreError as error:
        found.append([error.message, error.hint, error.retryable])
left = sorted(str(path) for path in Path(root).rglob("*") if path.is_file())
print(json.dumps({"errors": found, "left": left, "before": tier.get("job/before") == b"b" * 1000}))
"""


def _check_full(said: str, reason: str, hint: str, root: Path) -> None:
    result = json.loads(said)
    assert len(result["errors"]) == 3
    for message, error_hint, retryable in result["errors"]:
        assert message == f"can't write {root}/job/new: {reason}"
        assert hint in error_hint
        assert retryable
    assert result["left"] == [f"{root}/job/before"]
    assert result["before"]


def test_a_file_size_limit_leaves_nothing(tier: LocalTier) -> None:
    """A put that runs into RLIMIT_FSIZE is a `StoreError` with a hint, and leaves no object and no temporary file."""
    done = subprocess.run(
        [sys.executable, "-c", _FILL, str(tier.root), "limit"], check=True, capture_output=True, text=True
    )
    _check_full(done.stdout, "File too large", "ulimit -f", tier.root)


def test_a_full_disk_leaves_nothing(tier: LocalTier) -> None:
    """A put that fills a small real filesystem is a `StoreError` with a hint, and what was there before is intact."""
    # In a mount namespace of its own: whatever happens, the mount ends with the process.
    enter = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    tier.root.mkdir()
    script = 'mount -t tmpfs -o size=800k none "$1" || exit 77; exec "$2" -c "$3" "$1" full'
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here; the file size limit is tested instead")
    done = subprocess.run(
        [*enter, "sh", "-c", script, "sh", str(tier.root), sys.executable, _FILL],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode in (1, 77):
        pytest.skip(f"no filesystem can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    _check_full(done.stdout, "No space left on device", "free some space", tier.root)
    assert files_below(tier.root) == set()


def test_a_probe_on_a_full_disk_leaves_nothing(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """`check_writable` removes its probe even when it could be created but not written."""
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        real(path, b"")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match=r"can't write to .*No space left") as caught:
        tier.check_writable()
    assert "free some space" in (caught.value.hint or "")
    assert files_below(tier.root) == set()


# --- foreign and odd folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_a_file_in_the_way_is_a_store_error(tmp_path: Path, below: str) -> None:
    """A store that is a file, or lies below one, is refused with a hint: never mistaken for an object that exists."""
    (tmp_path / "file").write_bytes(b"someone's")
    tier = LocalTier(tmp_path / "file" / below)
    for call in (tier.check_writable, lambda: tier.put("job/a", b"x"), lambda: tier.put("a", b"x", create_only=True)):
        with pytest.raises(StoreError) as caught:
            call()
        assert not isinstance(caught.value, FencedError)
        assert caught.value.hint == "a file stands where a folder is needed: use another --store"
    assert (tmp_path / "file").read_bytes() == b"someone's"


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_a_store_error(tmp_path: Path) -> None:
    """A read-only folder is refused before a job starts, with a hint."""
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied") as caught:
        LocalTier(tmp_path / "store").check_writable()
    assert "owner and mode" in (caught.value.hint or "")


def test_deleting_removes_folders_that_are_empty(tier: LocalTier) -> None:
    """The folders of a pruned checkpoint go with its last object, the root and folders with neighbours stay."""
    for key in ("job/g1/s1/a", "job/g1/s1/b", "job/g1/generation.json"):
        tier.put(key, b"x")
    tier.delete("job/g1/s1/a")
    assert (tier.root / "job/g1/s1").is_dir()
    tier.delete("job/g1/s1/b")
    assert not (tier.root / "job/g1/s1").exists()
    tier.delete("job/g1/generation.json")
    assert not (tier.root / "job").exists()
    assert tier.root.is_dir()


def test_a_folder_that_vanishes_under_a_put_is_made_again(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prune that removes the still empty folder between its creation and the first write does not fail the put."""
    real, turns = local._write, []

    def meeting_a_prune(path: Path, data: memoryview) -> None:
        turns.append(path)
        if len(turns) <= 2:
            shutil.rmtree(tier.root / "job")
        real(path, data)

    monkeypatch.setattr(local, "_write", meeting_a_prune)
    tier.put("job/g1/s1/a", b"x")
    assert tier.get("job/g1/s1/a") == b"x"
    assert len(turns) == 3


def test_a_listing_survives_a_prune(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is removed while the listing walks leaves a listing of the others, not an error."""
    for key in ("job/s1/a", "job/s2/a"):
        tier.put(key, b"x")
    walk = tier.list("job/")
    first = next(walk)
    gone = "job/s1/a" if first.key == "job/s2/a" else "job/s2/a"
    tier.delete(gone)
    assert list(walk) == []
    with pytest.raises(NotFoundError):
        tier.get(gone)
