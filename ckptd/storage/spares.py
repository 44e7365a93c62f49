"""Spares: large files that were deleted, kept so that the next large file is written over their blocks.

A new file's blocks are allocated, and the filesystem has to note of each that it is written now, which costs commits
of its journal; those wait for whatever other programs have in flight. Over blocks that were written before nothing is
noted. A job flushes a checkpoint and prunes one of the same size, again and again, so after the first few of them it
writes over its own old files and takes no more room than without.

What makes that safe:

- A spare is nobody's. Its rename away from its key is durable before a byte of it is overwritten, or a power cut could
  bring the key back with foreign bytes. Whoever renames a spare out of the folder has it: two agents may share that.
- A reader that opened the file while it had its key finds its bytes unchanged. Before a spare is written the kernel is
  asked for a write lease, which it refuses while anybody else has the file open or mapped. That says nothing of other
  machines, so spares are kept only on filesystems that one machine has to itself.
- Without lease, room or anything else that it takes, a file is deleted and a new one written, as without spares.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path

from ckptd.storage.folders import make_folders, sync_folder
from ckptd.storage.image import round_up

_OF_ONE_MACHINE = frozenset({0xEF53, 0x58465342})
"""ext4 (2 and 3 too) and XFS, as `statfs` names them. Of others that belong to one machine btrfs and ZFS never write
over blocks, and tmpfs is no disk."""
_FOLDERS = 8
"""How many of the last folders say how large a checkpoint is: what is pruned now was put a while ago."""
_STATFS_BYTES = 512
"""More than the structure has anywhere; the type comes first in it."""
_libc = ctypes.CDLL(None, use_errno=True)


def closest(sizes: Mapping[str, int], wanted_bytes: int) -> str | None:
    """Return which spare to write `wanted_bytes` over: the one whose size is closest, or None.

    What it has too much is cut off and what it lacks allocated. Of one less than half as large most would be new
    anyway; one more than twice as large is better left to the file that it fits.
    """
    fitting = [name for name, size in sizes.items() if wanted_bytes <= 2 * size <= 4 * wanted_bytes]
    return min(fitting, key=lambda name: abs(sizes[name] - wanted_bytes), default=None)


class Spares:
    """The spares of one tier, in a folder that no listing shows. Any thread may call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}
        """The spares that may be taken, by name."""
        self._is_begun = False
        self._is_possible = False
        self._puts: dict[Path, dict[str, int]] = {}
        """The last folders that were put to, and the sizes of what was put there."""
        self._looks: tuple[int, int, int] | None = None
        """Owner, group, kind and mode of the files that this process puts."""

    @property
    def size_bytes(self) -> int:
        """What a put may write over, or have deleted when it needs the room."""
        with self._lock:
            return sum(self._sizes.values())

    def note(self, path: Path) -> None:
        """Note that a large file was put: the files put to one folder, a checkpoint's, bound what is kept."""
        with contextlib.suppress(OSError), self._lock:  # pruned already
            found = path.stat()
            self._puts.setdefault(path.parent, {})[path.name] = found.st_size
            if len(self._puts) > _FOLDERS:
                del self._puts[next(iter(self._puts))]
            self._looks = _looks(found)

    def keep(self, path: Path, min_bytes: int) -> bool:
        """Make a spare of a file instead of deleting it, durably; return False when the caller has to delete it.

        All spares together are at most as many files, and bytes, as this tier has put to one of the last folders;
        older spares make room. So a process that only prunes keeps nothing, one that flushes and prunes in turn keeps
        what the next flush needs, and of many files that are pruned at once only as much stays. What is small, or looks
        unlike the files that this process puts, is not kept.
        """
        try:
            found = path.lstat()
            if found.st_size < min_bytes or not self._may_keep(found):
                return False
            spare = self._folder / f"{self._folder.name}-{os.urandom(8).hex()}"  # as invisible as the folder
            make_folders(self._folder)
            path.rename(spare)
        except OSError:
            return False
        try:
            sync_folder(path.parent)
            sync_folder(self._folder)
        except BaseException:
            spare.unlink(missing_ok=True)  # it may come back under its key, so nothing may be written over it
            raise
        with self._lock:
            self._sizes[spare.name] = found.st_size
            superfluous = self._superfluous()
            for name in superfluous:
                del self._sizes[name]
        for name in superfluous:
            (self._folder / name).unlink(missing_ok=True)
        return True

    def take(self, to: Path, size_bytes: int) -> int | None:
        """Rename a spare to `to` and return a descriptor for writing `size_bytes` over it with O_DIRECT, or None.

        The file has whole blocks and no more of them than are written. When a spare can't be used it is deleted.
        """
        self._begin()
        with self._lock:
            name = closest(self._sizes, round_up(size_bytes))
            if name is None:
                return None
            del self._sizes[name]
        spare = self._folder / name
        try:
            os.utime(spare)  # it is in use from now on: no sweep may take it for a left-over
            spare.rename(to)
            return _open_private(to, size_bytes)
        except OSError:
            spare.unlink(missing_ok=True)
            to.unlink(missing_ok=True)  # a reader goes on with what it has open
            return None

    def remove(self) -> None:
        """Delete all spares, those of other processes too, for the room that they take."""
        with self._lock:
            self._sizes.clear()
        with contextlib.suppress(OSError), os.scandir(self._folder) as items:
            for item in items:
                with contextlib.suppress(OSError):  # somebody took it
                    Path(item).unlink()

    def sweep(self, before_s: float) -> list[Path]:
        """Delete spares that another process has left and wrote that long ago; return them. A live one misses nothing.

        It takes a new file where it wanted one of these.
        """
        removed = []
        with self._lock:
            ours = set(self._sizes)
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as items:
            for item in items:
                with contextlib.suppress(FileNotFoundError):  # somebody took it
                    if item.name not in ours and item.stat().st_mtime < before_s:
                        Path(item).unlink()
                        removed.append(Path(item))
        with contextlib.suppress(OSError):
            self._folder.rmdir()
        return removed

    def close(self) -> None:
        """Delete the spares of this tier, which nobody will write over any more, and their folder if that is empty.

        Called when the process ends, and maybe in one that was forked while another thread held the lock, so it takes
        none. Without this call, after a kill, the next process deletes them.
        """
        for name in list(self._sizes):
            with contextlib.suppress(OSError):
                (self._folder / name).unlink()
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _begin(self) -> None:
        """Before the first large file: delete what an earlier process left, whose rename may not be durable."""
        with self._lock:
            if self._is_begun:
                return
            self._is_begun = True
            self._is_possible = _filesystem(self._folder.parent) in _OF_ONE_MACHINE
        self.remove()

    def _may_keep(self, found: os.stat_result) -> bool:
        with self._lock:
            most_bytes = max((sum(sizes.values()) for sizes in self._puts.values()), default=0)
            return self._is_possible and self._looks == _looks(found) and found.st_size <= most_bytes

    def _superfluous(self) -> list[str]:
        """Return which spares have to go, the oldest first."""
        most_files = max((len(sizes) for sizes in self._puts.values()), default=0)
        most_bytes = max((sum(sizes.values()) for sizes in self._puts.values()), default=0)
        names = list(self._sizes)
        kept_bytes = sum(self._sizes.values())
        count = 0
        while len(names) - count > most_files or kept_bytes > most_bytes:
            kept_bytes -= self._sizes[names[count]]
            count += 1
        return names[:count]


def _looks(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_uid, found.st_gid, found.st_mode


def _open_private(path: Path, size_bytes: int) -> int:
    """Open a file that nobody else uses, cut to whole blocks; an `OSError` when somebody does, or can't be excluded."""
    descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        # For as long as it is held, a lease is called back with a signal: this one is ignored, SIGIO would kill.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        try:
            if os.fstat(descriptor).st_nlink != 1:
                raise OSError(f"{path} has another name")
        finally:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.ftruncate(descriptor, round_up(size_bytes))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _filesystem(folder: Path) -> int | None:
    """Return the type of the filesystem that a folder is on, None when it can't be told."""
    found = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.statfs(os.fsencode(folder), found) != 0:
        return None
    return ctypes.c_long.from_buffer(found).value
