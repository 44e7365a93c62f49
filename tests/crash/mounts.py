"""Small filesystems of a test's own, which are gone at its end whatever happens."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(kind: str, folder: Path, size_mib: int) -> Iterator[Path]:
    """Mount a tmpfs or an ext4 in a file at a new folder; skips the test where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("mounts need root")
    folder.mkdir()
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "ckptd-test", str(folder)]
    else:
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("no mkfs.ext4: install e2fsprogs")
        image = folder.with_name(f"{folder.name}.img")
        with image.open("wb") as file:
            file.truncate(size_mib * 2**20)
        _run(["mkfs.ext4", "-q", "-m", "0", str(image)])
        command = _mount_command(image, folder)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounts are not allowed here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        for _ in range(50):
            if subprocess.run(["umount", str(folder)], capture_output=True, check=False).returncode == 0:
                break
        else:
            _run(["umount", "-l", str(folder)])


def _mount_command(image: Path, folder: Path) -> list[str]:
    return ["mount", "-o", "loop,errors=remount-ro", str(image), str(folder)]


def remount(folder: Path, how: str) -> None:
    """Mount a folder's filesystem anew, "ro" or "rw"; nobody may have a file of it open for writing."""
    _run(["mount", "-o", f"remount,{how}", str(folder)])


def turn_read_only(folder: Path) -> None:
    """Have an ext4 meet an error, upon which it takes no more writes, whoever has it open; skips where it can't be."""
    device = os.path.realpath(subprocess.check_output(["findmnt", "-no", "SOURCE", str(folder)], text=True).strip())
    trigger = Path("/sys/fs/ext4") / Path(device).name / "trigger_fs_error"
    if not trigger.exists():
        pytest.skip("this kernel has no trigger_fs_error")
    trigger.write_text("ckptd-test")


def mount_again(folder: Path) -> None:
    """Unmount an ext4 and mount it anew, as an administrator does after an error."""
    _run(["umount", str(folder)])
    _run(_mount_command(folder.with_name(f"{folder.name}.img"), folder))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
