"""In which order the local tier talks to the kernel: what makes a commit survive a power cut.

No test can cut the power. What can be proven is the order of the calls: the bytes of the file are durable before it
gets its name, and the name is durable before the put returns.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.storage.local import LocalTier
from tests.storage.files import aligned
from tests.storage.spared import skip_without_spares

_CASES = [("small", 10, False), ("small new", 10, True), ("direct", 2**20, False), ("direct new", 2**20, True)]
_NAMES = [case[0] for case in _CASES]


def _wanted(folder: str, *, create_only: bool) -> list[tuple[str, str]]:
    if create_only:  # what may commit a checkpoint: the name of its folder may be of somebody who was killed
        above = str(Path(folder).parent)
        return [("fsync", "file"), ("fsync", above), ("link", "object"), ("fsync", folder)]
    return [("fsync", "file"), ("rename", "object"), ("fsync", folder)]


@pytest.mark.parametrize(("name", "size", "create_only"), _CASES, ids=_NAMES)
def test_durable_before_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int, create_only: bool
) -> None:
    """fsync of the file, then the name, then fsync of the folder: as the tier calls the operating system."""
    tier = LocalTier(tmp_path)
    tier.put("job/before", b"x")  # so that the folders are there
    calls: list[tuple[str, str]] = []
    real_fsync, real_link, real_rename = os.fsync, os.link, os.rename

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(("fsync", str(path) if path.is_dir() else "file"))
        assert path.is_dir() or (os.fstat(descriptor).st_size == size and path.name.startswith(".tmp-"))
        real_fsync(descriptor)

    def link(source: Path, target: Path) -> None:
        calls.append(("link", Path(target).name))
        real_link(source, target)

    def rename(source: Path, target: Path) -> None:
        calls.append(("rename", Path(target).name))
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "rename", rename)
    tier.put("job/object", b"x" * size, create_only=create_only)
    wanted = _wanted(str(tmp_path / "job"), create_only=create_only)
    assert calls[-len(wanted) :] == wanted
    assert all(call == ("fsync", "file") for call in calls[: -len(wanted)]), name  # at most a refused direct write


def test_new_folders_are_durable_from_the_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent of every folder that a put makes is fsynced, the uppermost first, before the file is written.

    So is the one above those: the folder that was there may be of somebody who was killed before its name was durable.
    """
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append(path if Path(path).is_dir() else "file")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    LocalTier(tmp_path / "store").put("job/g1/object", b"x")
    store = f"{tmp_path}/store"
    assert synced == [str(tmp_path.parent), str(tmp_path), store, f"{store}/job", "file", f"{store}/job/g1"]


def test_a_deletion_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is fsynced after the unlink: a manifest that was deleted stays so, and its checkpoint uncommitted."""
    tier = LocalTier(tmp_path)
    tier.put("job/manifest.json", b"x")
    tier.put("job/neighbour", b"x")
    seen: list[bool] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        seen.append((tmp_path / "job/manifest.json").exists())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    tier.delete("job/manifest.json")
    assert seen == [False]


@pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace here; the recorder above has the order")
@pytest.mark.parametrize(("name", "size", "create_only"), _CASES, ids=_NAMES)
def test_durable_before_named_for_the_kernel(tmp_path: Path, name: str, size: int, create_only: bool) -> None:
    """The same order, as the kernel sees it: traced from outside with strace."""
    (tmp_path / "store/job").mkdir(parents=True)
    trace = tmp_path / "trace"
    code = f"""
import mmap
from pathlib import Path
from ckptd.storage.local import LocalTier
image = memoryview(mmap.mmap(-1, {size}))
LocalTier(Path({str(tmp_path / "store")!r})).put("job/object", image, create_only={create_only})
"""
    calls = "trace=fsync,fdatasync,link,linkat,rename,renameat,renameat2,pwrite64"
    done = subprocess.run(
        ["strace", "-f", "-y", "-e", calls, "-o", str(trace), sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
    )
    if "ptrace" in done.stderr.lower():
        pytest.skip(f"tracing is not allowed here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    events: list[tuple[str, str]] = []
    for line in trace.read_text().splitlines():
        if re.search(r"(rename|link)(at2?)?\(", line) and "job/object" in line and line.endswith("= 0"):
            events.append(("link" if "link" in line else "rename", "object"))
        elif match := re.search(r"fsync\(\d+<([^>]+)>\)\s*= 0", line):
            events.append(("fsync", "file" if ".tmp-" in match[1] else match[1]))
        elif "pwrite64(" in line and ".tmp-" in line and "EINVAL" not in line:
            events.append(("write", "file"))
    wanted = [("write", "file"), *_wanted(f"{tmp_path}/store/job", create_only=create_only)]
    assert events == wanted, name


_OVER_A_SPARE = [
    ("rename", "job/s1/a", "spare"),
    ("fsync", "job/s1"),
    ("fsync", ".tmp-spares"),
    ("rename", "spare", "job/s3/temporary"),
    ("write", "job/s3/temporary"),
    ("fsync", "job/s3/temporary"),
    ("rename", "job/s3/temporary", "job/s3/a"),
    ("fsync", "job/s3"),
]
"""A file is durably out of the folder of its key before a byte of it is written over."""


def _short(root: Path, path: str) -> str:
    """Name a path below the root of a store, without what is random in it."""
    short = path.removeprefix(f"{root}/")
    if short.startswith(".tmp-spares/"):
        return "spare"
    return re.sub(r"\.tmp-[0-9a-f]{16}-.*", "temporary", short)


def _prepare(tier: LocalTier) -> None:
    for key in ("job/s1/a", "job/s2/a", "job/s2/b", "job/s3/b"):
        tier.put(key, aligned(2**20))
    tier.delete("job/s2/b")  # so that the folders are there


def test_nothing_is_written_over_before_its_name_is_durably_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of renames, fsyncs and writes when a put takes what a delete left, as the tier calls them."""
    skip_without_spares(tmp_path)
    tier = LocalTier(tmp_path)
    _prepare(tier)
    tier._spares.remove()
    calls: list[tuple[str, ...]] = []
    real_fsync, real_rename, real_pwrite = os.fsync, os.rename, os.pwrite

    def name(descriptor: int) -> str:
        return _short(tmp_path, os.readlink(f"/proc/self/fd/{descriptor}"))

    def fsync(descriptor: int) -> None:
        calls.append(("fsync", name(descriptor)))
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        calls.append(("rename", _short(tmp_path, str(source)), _short(tmp_path, str(target))))
        real_rename(source, target)

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(("write", name(descriptor)))
        return real_pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "pwrite", pwrite)
    tier.delete("job/s1/a")
    tier.put("job/s3/a", aligned(2**20))
    assert calls == _OVER_A_SPARE


@pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace here; the recorder above has the order")
def test_nothing_is_written_over_before_its_name_is_durably_gone_for_the_kernel(tmp_path: Path) -> None:
    """The same order, as the kernel sees it: nothing else writes to the file, makes it longer or cuts it."""
    skip_without_spares(tmp_path)
    root, trace = tmp_path / "store", tmp_path / "trace"
    code = """
import sys
from pathlib import Path
from ckptd.storage.local import LocalTier
from tests.storage.files import aligned
from tests.storage.test_local_order import _prepare
tier = LocalTier(Path(sys.argv[1]))
_prepare(tier)
tier._spares.remove()
Path(sys.argv[1], "from-here").mkdir()
tier.delete("job/s1/a")
tier.put("job/s3/a", aligned(2**20))
"""
    calls = "trace=mkdir,fsync,fdatasync,/^rename.*,/.*pwrite.*,write,ftruncate,fallocate"
    done = subprocess.run(
        ["strace", "-f", "-y", "-e", calls, "-o", str(trace), sys.executable, "-c", code, str(root)],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    if "ptrace" in done.stderr.lower():
        pytest.skip(f"tracing is not allowed here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    lines = trace.read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if "from-here" in line)
    events: list[tuple[str, ...]] = []
    for line in lines[begin + 1 :]:
        names = tuple(_short(root, name) for name in re.findall(rf"[<\"]({re.escape(str(root))}/[^>\"]*)[>\"]", line))
        call = re.sub(r"^\d+\s+", "", line).partition("(")[0]
        if names:
            events.append(({"pwrite64": "write", "renameat2": "rename", "renameat": "rename"}.get(call, call), *names))
    cut_and_filled = [("ftruncate", "job/s3/temporary"), ("fallocate", "job/s3/temporary")]
    assert events == [*_OVER_A_SPARE[:4], *cut_and_filled, *_OVER_A_SPARE[4:]]
