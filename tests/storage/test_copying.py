"""Uploads: all files and then the manifest, nothing twice, nothing damaged, and however often they are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ckptd.errors import DamagedError, FencedError, NotFoundError, StoreError
from ckptd.storage import catalog, keys
from ckptd.storage.copying import Copied, copy_files, upload
from ckptd.storage.local import LocalTier
from ckptd.storage.memory import MemoryTier
from ckptd.storage.tier import Data, Pace, Tier
from tests.storage.checkpoints import FIRST, JOB, LATER, fill, flip, good, is_right, needed, span
from tests.storage.files import files_below

ROOT = Path(__file__).resolve().parents[2]
KEY = keys.shard_key(JOB, FIRST, 1)
MANIFEST = keys.manifest_key(JOB, FIRST)


class Noting(MemoryTier):
    """A tier that notes what is put, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.puts: list[str] = []

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Note it."""
        super().put(key, data, create_only=create_only, pace=pace)
        self.puts.append(key)


class Plain(Noting):
    """A tier that has no create-only put."""

    capabilities = replace(MemoryTier.capabilities, create_only_put=False)

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Refuse what it can't."""
        assert not create_only
        super().put(key, data, pace=pace)


@pytest.fixture
def source(tmp_path: Path) -> Tier:
    """A local tier with both checkpoints."""
    return fill(LocalTier(tmp_path / "source"))


@pytest.mark.parametrize("kind", [Noting, Plain])
@pytest.mark.parametrize("threads", [1, 4])
def test_an_upload_is_the_same_files_and_then_the_manifest(source: Tier, kind: type[Noting], threads: int) -> None:
    """Everything that a checkpoint needs is there before its manifest, byte for byte, and nothing else is."""
    target = kind()
    told: list[int] = []
    paced: list[int] = []
    copied = upload(source, target, JOB, LATER, threads=threads, progress=told.append, pace=paced.append)
    key = keys.manifest_key(JOB, LATER)
    assert target.puts[-1] == key
    assert set(target.puts) == {key, *needed(LATER)}
    assert all(target.get(put) == good()[put] for put in target.puts)
    assert {f"{JOB}/{file}" for file in copied.files} == needed(LATER)
    assert copied.size_bytes == sum(told) == sum(paced) == sum(len(good()[key]) for key in needed(LATER))
    assert catalog.verify(target, JOB, LATER) == []
    assert upload(source, target, JOB, LATER) == Copied((), 0)


def test_an_upload_between_folders(source: Tier, tmp_path: Path) -> None:
    """A local tier as the target has the same files, and no others."""
    target = LocalTier(tmp_path / "target")
    for checkpoint in (FIRST, LATER):
        upload(source, target, JOB, checkpoint)
        assert is_right(target, checkpoint)
    assert files_below(tmp_path / "target") == files_below(tmp_path / "source")


def test_files_that_are_there_are_not_sent_again(source: Tier) -> None:
    """What an earlier upload has brought stays; what is there with another size is replaced."""
    target = Noting()
    upload(source, target, JOB, FIRST)
    (new, second) = (keys.shard_key(JOB, LATER, rank) for rank in (0, 1))
    target.put(new, b"cut short")
    target.puts.clear()
    copied = upload(source, target, JOB, LATER)
    assert set(target.puts) == {new, second, keys.manifest_key(JOB, LATER)}
    assert len(copied.files) == 2
    assert is_right(target, LATER)


@pytest.mark.parametrize("kind", [Noting, Plain])
@pytest.mark.parametrize("stands", [b"", b"{}", good()[MANIFEST][:-1]])
def test_another_manifest_is_left_alone(source: Tier, kind: type[Noting], stands: bytes) -> None:
    """Where another manifest stands nothing is put."""
    target = kind()
    target.put(MANIFEST, stands)
    target.puts.clear()
    with pytest.raises(FencedError, match=MANIFEST):
        upload(source, target, JOB, FIRST)
    assert target.puts == []
    assert target.get(MANIFEST) == stands


@pytest.mark.parametrize("stands", [good()[MANIFEST], b"another"])
def test_two_uploads_at_once(source: Tier, stands: bytes) -> None:
    """When the manifest appears just before ours, it is ours if it is the same, and we are fenced off if not."""

    class Racing(Noting):
        def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
            if key == MANIFEST and key not in self.objects:
                super().put(key, stands)
            super().put(key, data, create_only=create_only, pace=pace)

    target = Racing()
    if stands == good()[MANIFEST]:
        upload(source, target, JOB, FIRST)
        assert is_right(target, FIRST)
    else:
        with pytest.raises(FencedError):
            upload(source, target, JOB, FIRST)
    assert target.get(MANIFEST) == stands


@pytest.mark.parametrize("at", [20, span(KEY, "weight")[0], span(KEY, "head")[1] - 1, len(good()[KEY]) - 1])
def test_a_damaged_source_is_not_committed_elsewhere(source: Tier, tmp_path: Path, at: int) -> None:
    """A flipped bit on its way is an error that names the file, and neither it nor the manifest appears."""
    flip(source, KEY, at)
    target = LocalTier(tmp_path / "target")
    with pytest.raises(DamagedError, match=KEY):
        upload(source, target, JOB, FIRST)
    assert not {KEY, MANIFEST} & files_below(tmp_path / "target")


@pytest.mark.parametrize("size", [0, 4096, len(good()[KEY]) - 1])
def test_a_source_that_was_cut_is_not_committed_elsewhere(source: Tier, size: int) -> None:
    """Nor does a file of another size."""
    source.put(KEY, good()[KEY][:size])
    target = MemoryTier()
    with pytest.raises(DamagedError, match=f"{KEY}: {size} bytes where the manifest says"):
        upload(source, target, JOB, FIRST)
    assert KEY not in target.objects and MANIFEST not in target.objects


def test_what_is_missing_is_not_committed_elsewhere(source: Tier) -> None:
    """A missing file or manifest of the source is said by name."""
    source.delete(KEY)
    target = MemoryTier()
    with pytest.raises(NotFoundError, match=KEY):
        upload(source, target, JOB, FIRST)
    source.delete(MANIFEST)
    with pytest.raises(NotFoundError, match=MANIFEST):
        upload(source, target, JOB, FIRST)
    assert MANIFEST not in target.objects


def test_only_the_given_files_are_copied(source: Tier) -> None:
    """`copy_files` copies what it is given, and commits nothing."""
    target = Noting()
    loaded = catalog.load_manifest(source, JOB, FIRST)
    file = KEY.removeprefix(f"{JOB}/")
    assert copy_files(source, target, JOB, loaded, {file}) == Copied((file,), len(good()[KEY]))
    assert target.puts == [KEY]


def test_a_longer_copy_of_an_earlier_file_stays(source: Tier) -> None:
    """Of a file that is referred to, a copy that was cut behind what is needed does not replace the whole one."""
    source.put(KEY, good()[KEY][: span(KEY, "head")[0] + 5000])
    target = Noting()
    target.put(KEY, good()[KEY])
    upload(source, target, JOB, LATER)
    assert target.get(KEY) == good()[KEY]
    target.put(KEY, good()[KEY][:100])
    target.delete(keys.manifest_key(JOB, LATER))
    upload(source, target, JOB, LATER)
    assert catalog.verify(target, JOB, LATER) == []


@pytest.mark.parametrize("fails_at", range(4))
def test_an_upload_that_failed_goes_on(source: Tier, fails_at: int) -> None:
    """After a failed put, a second upload sends the rest, and nothing is committed in between."""

    class Failing(Noting):
        is_down = True

        def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
            if self.is_down and len(self.puts) == fails_at:
                raise StoreError("the bucket is down")
            super().put(key, data, create_only=create_only, pace=pace)

    target = Failing()
    with pytest.raises(StoreError, match="down"):
        upload(source, target, JOB, LATER, threads=1)
    assert keys.manifest_key(JOB, LATER) not in target.objects
    target.is_down = False
    copied = upload(source, target, JOB, LATER, threads=1)
    assert len(copied.files) == 3 - fails_at
    assert len(target.puts) == 4
    assert is_right(target, LATER)


_UPLOAD = """
import sys
from pathlib import Path
from ckptd.storage.copying import upload
from ckptd.storage.local import LocalTier
from ckptd.storage.pacing import Pacer
from ckptd.types import CheckpointId
source, target = (LocalTier(Path(folder)) for folder in sys.argv[1:3])
print("begin", flush=True)
upload(source, target, "gpt", CheckpointId(1, 20), pace=Pacer(40e6))
"""


def test_an_upload_that_is_killed_again_and_again(source: Tier, tmp_path: Path) -> None:
    """Killed at any moment, an upload never leaves a file that is not whole nor a commit that is, and it arrives."""
    folder = tmp_path / "target"
    target = LocalTier(folder)
    rng = random.Random(5)
    kills = 0
    for turn in range(100):
        process = subprocess.Popen(
            [sys.executable, "-c", _UPLOAD, str(tmp_path / "source"), str(folder)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert process.stdout is not None
        with process.stdout as output:
            output.readline()
            time.sleep(rng.uniform(0, 0.1 + 0.05 * turn))  # at 40 MB/s it takes 0.4 s
            os.kill(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        objects = {entry.key for entry in target.list(f"{JOB}/")}
        assert all(target.get(key) == good()[key] for key in objects)
        if keys.manifest_key(JOB, LATER) in objects:
            break
    assert kills > 1
    assert is_right(target, LATER)
    assert all("temporary file" in line for line in target.sweep(f"{JOB}/", -1.0))
    assert files_below(folder) == {keys.manifest_key(JOB, LATER), *needed(LATER)}
