"""What is particular to the local tier: temporary files, full disks, foreign folders."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptd.errors import FencedError, NotFoundError, StoreError
from ckptd.storage import local
from ckptd.storage.local import LocalTier
from ckptd.storage.spares import Spares
from ckptd.storage.tier import Pace
from tests.storage.files import files_below


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    """A local tier in a folder that does not exist yet."""
    return LocalTier(tmp_path / "store")


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


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Give up root's right to write everywhere, for a while."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


def test_a_folder_without_permission_is_a_store_error(tmp_path: Path) -> None:
    """A read-only folder is refused before a job starts, with a hint."""
    tmp_path.chmod(0o500)
    with ordinary_user(), pytest.raises(StoreError, match="Permission denied") as caught:
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

    def meeting_a_prune(path: Path, parts: Sequence[memoryview], pace: Pace | None, spares: Spares) -> None:
        turns.append(path)
        if len(turns) <= 2:
            shutil.rmtree(tier.root / "job")
        real(path, parts, pace, spares)

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
