"""The server's side of the NBD protocol, as much of it as QEMU needs: one export, read, write, flush, FUA.

https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from tests.powercut.disk import Disk

_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_HAS_FLAGS, _SEND_FLUSH, _SEND_FUA = 1, 4, 8
_OPTION_ABORT, _OPTION_GO = 2, 7
_ACK, _INFO, _UNSUPPORTED = 1, 3, 2**31 + 1
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3
_OPTION_REPLY_MAGIC, _REQUEST_MAGIC, _REPLY_MAGIC = 0x3E889045565A9, 0x25609513, 0x67446698
_MOST_BYTES = 32 * 2**20
_FUA = 1
FLUSH_S = 0.02
"""How long a flush takes: other threads of the guest write meanwhile, so the cache is rarely empty."""


class Kind(IntEnum):
    """What a client asks for."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3


def serve(connection: socket.socket, disk: Disk, is_powered: Callable[[Kind], bool]) -> None:
    """Serve a client until it goes, or until `is_powered`, asked before each request is carried out, says no.

    A flush takes its time, in which other requests are served. A request that is not carried out is not answered
    either: nobody can take it for done.
    """
    with contextlib.suppress(EOFError, ConnectionError):  # killed: what it had not sent completely was never written
        if _negotiate(connection, disk.size_bytes):
            _Transmission(connection, disk, is_powered).run()


@dataclass(frozen=True, slots=True)
class _Flush:
    handle: int
    taken: int
    due_s: float


class _Transmission:
    """What follows once client and server agree."""

    def __init__(self, connection: socket.socket, disk: Disk, is_powered: Callable[[Kind], bool]) -> None:
        self._connection = connection
        self._disk = disk
        self._is_powered = is_powered
        self._flushes: deque[_Flush] = deque()

    def run(self) -> None:
        """Serve requests until the client or the power goes."""
        has_power = True
        while has_power:
            now_s = time.monotonic()
            if self._flushes and self._flushes[0].due_s <= now_s:
                has_power = self._flush(self._flushes.popleft())
                continue
            wait_s = self._flushes[0].due_s - now_s if self._flushes else None
            if select.select([self._connection], [], [], wait_s)[0]:
                has_power = self._serve_one()

    def _flush(self, flush: _Flush) -> bool:
        if not self._is_powered(Kind.FLUSH):
            return False
        self._disk.flush(flush.taken)
        self._answer(flush.handle)
        return True

    def _serve_one(self) -> bool:
        magic, flags, number, handle, offset, size = _REQUEST.unpack(_receive(self._connection, _REQUEST.size))
        if magic != _REQUEST_MAGIC:
            raise ValueError(f"a request begins with {magic:#x}")
        data = _receive(self._connection, size) if number == Kind.WRITE else b""
        if number == Kind.DISCONNECT:
            return False
        if number == Kind.FLUSH:
            self._flushes.append(_Flush(handle, self._disk.taken, time.monotonic() + FLUSH_S))
        elif number not in (Kind.READ, Kind.WRITE):
            self._answer(handle, error=errno.EINVAL)
        elif not self._is_powered(Kind(number)):
            return False
        elif number == Kind.READ:
            self._answer(handle, self._disk.read(offset, size))
        else:
            self._disk.write(offset, data, fua=bool(flags & _FUA))
            self._answer(handle)
        return True

    def _answer(self, handle: int, data: bytes = b"", *, error: int = 0) -> None:
        self._connection.sendall(_REPLY.pack(_REPLY_MAGIC, error, handle) + data)


def _negotiate(connection: socket.socket, size_bytes: int) -> bool:
    """Agree with a client on the one export; return False when it does not want it."""
    connection.sendall(_GREETING.pack(b"NBDMAGIC", b"IHAVEOPT", _FIXED_NEWSTYLE | _NO_ZEROES))
    _receive(connection, 4)
    while True:
        magic, option, size = _OPTION.unpack(_receive(connection, _OPTION.size))
        if magic != b"IHAVEOPT":
            raise ValueError(f"an option begins with {magic!r}")
        _receive(connection, size)
        if option == _OPTION_GO:
            flags = _HAS_FLAGS | _SEND_FLUSH | _SEND_FUA
            _answer(connection, option, _INFO, struct.pack(">HQH", _INFO_EXPORT, size_bytes, flags))
            _answer(connection, option, _INFO, struct.pack(">HIII", _INFO_BLOCK_SIZE, 512, 4096, _MOST_BYTES))
            _answer(connection, option, _ACK)
            return True
        _answer(connection, option, _ACK if option == _OPTION_ABORT else _UNSUPPORTED)
        if option == _OPTION_ABORT:
            return False


def _answer(connection: socket.socket, option: int, kind: int, data: bytes = b"") -> None:
    connection.sendall(_OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, kind, len(data)) + data)


def _receive(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(min(size - len(data), 2**20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)
