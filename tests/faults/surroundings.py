"""What a job of the fault table runs in: a memory limit, a small disk and a wall clock that can be moved."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.end_to_end.harness import until

CLOCK_C = Path(__file__).parent / "scripts" / "clock.c"
DISK_BYTES = 64 * 2**20
_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
_CHUNK = b"x" * 2**16


class MemoryGroup:
    """A memory cgroup, v1 or v2, for a job to run in."""

    def __init__(self, folder: Path, limit: str, usage: str) -> None:
        self._folder = folder
        self._limit = folder / limit
        self._usage = folder / usage

    @property
    def prefix(self) -> tuple[str, ...]:
        """What comes before a command that is to run in it."""
        return ("/bin/sh", "-c", f'echo $$ > {self._folder / "cgroup.procs"} && exec "$@"', "sh")

    @contextmanager
    def tight(self, room_bytes: int) -> Iterator[None]:
        """Leave so much room for as long as the block lasts, beyond what is used now."""
        before = self._limit.read_text()
        self._limit.write_text(str(int(self._usage.read_text()) + room_bytes))
        try:
            yield
        finally:
            self._limit.write_text("-1" if before.strip().isdecimal() else before)

    def remove(self) -> None:
        """Remove it, as soon as nothing runs in it any more."""

        def removed() -> bool:
            with suppress(OSError):
                self._folder.rmdir()
            return not self._folder.exists()

        until(removed, "the end of the memory cgroup")


def memory_group(name: str) -> MemoryGroup | None:
    """Make a memory cgroup; None where this user can't, or the kernel has none."""
    with suppress(OSError):
        if (_V1 / "memory.limit_in_bytes").exists():
            (_V1 / name).mkdir()
            return MemoryGroup(_V1 / name, "memory.limit_in_bytes", "memory.usage_in_bytes")
        if "memory" in (_V2 / "cgroup.subtree_control").read_text():
            (_V2 / name).mkdir()
            return MemoryGroup(_V2 / name, "memory.max", "memory.current")
    return None


class Clock:
    """The wall clock of the programs that get `env`."""

    def __init__(self, folder: Path) -> None:
        self._offset = folder / "clock-offset"
        self.env: dict[str, str] = {}
        self.moved_s = 0
        self.move(0)
        library = folder / "clock.so"
        command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(CLOCK_C), "-ldl"]
        with suppress(OSError):
            if subprocess.run(command, check=False, capture_output=True).returncode == 0:
                self.env = {"LD_PRELOAD": str(library), "FAULTS_CLOCK": str(self._offset)}

    def move(self, to_s: int) -> None:
        """Set the clock to so many seconds beside the true one."""
        self.moved_s = to_s
        with open(os.open(self._offset, os.O_WRONLY | os.O_CREAT), "wb") as file:
            file.write(struct.pack("q", to_s))


def mount_disk(place: Path) -> bool:
    """Mount a small filesystem at a new folder; return whether this user may."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "ckptd-test", str(place)]
    return os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0


def unmount_disk(place: Path) -> None:
    """Unmount it, once nobody uses it any more."""
    command = ["umount", str(place)]
    until(lambda: subprocess.run(command, check=False, capture_output=True).returncode == 0, "the unmounting")


def fill(path: Path) -> None:
    """Take all the room that there is now."""
    with path.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(_CHUNK)
        except OSError:
            return
