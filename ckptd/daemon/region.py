"""Memory regions that can be lent: files in memory whose every page is there before anybody may write it.

Huge pages where the machine allows them, by one of two doors. An agent with CAP_SYS_ADMIN opens a tmpfs of its own with
`huge=always`, which is mounted nowhere and gone with its last file. Any other advises the kernel to use them for a
memfd, which it heeds when `transparent_hugepage/shmem_enabled` is "advise" or more; by default that is "never".
Measured with 512 MiB: mapping a slot anew costs 0.2 ms instead of 19 ms, and a restore from memory reaches three
quarters of memcpy's speed instead of three fifths. MFD_HUGETLB is not used: it needs pages that an administrator has
set aside beforehand, which nobody else can use then.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Callable

from ckptd.errors import MemoryBudgetError, invariant
from ckptd.protocol.page import PAGE_BYTES
from ckptd.units import show_size

HUGE_BYTES = 2 * 2**20
PIECE_BYTES = 64 * 2**20
"""How much is reserved at once. So much, and no more, is counted twice for each rank that is reserving."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
"""System call numbers, the same on every architecture."""
_SET_STRING, _CREATE = 1, 6
_CLOEXEC = 1


def make(name: str, size_bytes: int, settle: Callable[[int], None] = lambda _: None) -> tuple[int, mmap.mmap]:
    """Return a memory region whose pages are there, as a descriptor and mapped; `settle` is told of each piece.

    Raises `MemoryBudgetError` when the kernel has too little memory.
    """
    invariant(size_bytes % PAGE_BYTES == 0, "a memory region is a whole number of pages")
    with contextlib.ExitStack() as undo:
        try:
            descriptor = _open(name, size_bytes)
            undo.callback(os.close, descriptor)
            os.ftruncate(descriptor, size_bytes)
            mapped = undo.enter_context(mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED))
            _fill(descriptor, mapped, settle)
        except OSError as error:
            raise MemoryBudgetError(
                f"not enough memory for slots: the kernel refused {show_size(size_bytes)} ({size_bytes} bytes): "
                f"{error.strerror}"
            ) from error
        undo.pop_all()
    return descriptor, mapped


def _fill(descriptor: int, mapped: mmap.mmap, settle: Callable[[int], None]) -> None:
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    _libc.madvise(address, len(mapped), _MADV_HUGEPAGE)  # advice: a kernel without huge pages refuses it
    for at in range(0, len(mapped), PIECE_BYTES):
        piece_bytes = min(PIECE_BYTES, len(mapped) - at)
        _reserve(descriptor, address, at, piece_bytes)
        settle(piece_bytes)


def _open(name: str, size_bytes: int) -> int:
    """Return an empty file in memory, one with huge pages if that is possible."""
    if size_bytes >= HUGE_BYTES:
        with contextlib.suppress(OSError):  # no right to, no such kernel, or a filter of system calls
            return _open_huge(name)
    return os.memfd_create(name, os.MFD_CLOEXEC)


def _open_huge(name: str) -> int:
    context = _call(_FSOPEN, b"tmpfs", _CLOEXEC)
    try:
        for key, value in ((b"huge", b"always"), (b"size", b"0"), (b"mode", b"0700")):  # size 0: as much as there is
            _call(_FSCONFIG, context, _SET_STRING, key, value, 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        mount = _call(_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        shown = f"memfd:{name}"  # so that it looks in `lsof` and `pmap` like any slot
        descriptor = os.open(shown, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=mount)
        os.unlink(shown, dir_fd=mount)
    finally:
        os.close(mount)
    return descriptor


def _call(number: int, *arguments: int | bytes | None) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _reserve(descriptor: int, address: int, at: int, size_bytes: int) -> None:
    """Have the kernel provide and clear a piece, through our own mapping, which is where huge pages are decided."""
    if _libc.madvise(address + at, size_bytes, _MADV_POPULATE_WRITE) == 0:
        return
    number = ctypes.get_errno()
    if number == errno.EINVAL:  # a kernel before 5.14
        os.posix_fallocate(descriptor, at, size_bytes)
        return
    if number == errno.EFAULT:  # what would have been SIGBUS in a process that writes there
        number = errno.ENOMEM
    raise OSError(number, os.strerror(number))
