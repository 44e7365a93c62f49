"""The server speaks NBD: what is flushed is durable, and without power nothing is carried out or answered."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.powercut import nbd
from tests.powercut.disk import Disk

_SIZE_BYTES = 64 * 1024
_READ, _WRITE, _DISCONNECT, _FLUSH, _TRIM = range(5)


class Client:
    """The client's side, by hand."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def negotiate(self) -> tuple[int, int]:
        """Ask for something unknown, then for the export; return its size and flags."""
        assert self.receive(18) == b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
        self._connection.sendall(struct.pack(">I", 3))
        assert self._option(8, b"") == [(2**31 + 1, b"")]
        answers = self._option(7, struct.pack(">IH", 0, 0))
        assert [kind for kind, _ in answers] == [3, 3, 1]
        number, size_bytes, flags = struct.unpack(">HQH", answers[0][1])
        assert number == 0
        assert struct.unpack(">HIII", answers[1][1])[:2] == (3, 512)
        return size_bytes, flags

    def _option(self, number: int, data: bytes) -> list[tuple[int, bytes]]:
        self._connection.sendall(struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data)
        answers = []
        while not answers or answers[-1][0] == 3:
            magic, option, kind, size = struct.unpack(">QIII", self.receive(20))
            assert (magic, option) == (0x3E889045565A9, number)
            answers.append((kind, self.receive(size)))
        return answers

    def send(self, kind: int, offset: int = 0, size: int = 0, data: bytes = b"", flags: int = 0) -> None:
        """Send a request."""
        self._connection.sendall(struct.pack(">IHHQQI", 0x25609513, flags, kind, 42, offset, size or len(data)) + data)

    def ask(self, kind: int, offset: int = 0, size: int = 0, data: bytes = b"", flags: int = 0) -> tuple[int, bytes]:
        """Send a request; return the error's number and the data of the answer."""
        self.send(kind, offset, size, data, flags)
        magic, error, handle = struct.unpack(">IIQ", self.receive(16))
        assert (magic, handle) == (0x67446698, 42)
        return error, self.receive(size if kind == _READ else 0)

    def receive(self, size: int) -> bytes:
        """Receive so many bytes, fewer when the server has gone."""
        data = b""
        while len(data) < size and (piece := self._connection.recv(size - len(data))):
            data += piece
        return data


class World:
    """A disk, its server in a thread, and a client."""

    def __init__(self, connection: socket.socket) -> None:
        self.durable = bytearray(_SIZE_BYTES)
        self.disk = Disk(self.durable, bytearray(_SIZE_BYTES))
        self.client = Client(connection)
        self.is_powered: Callable[[nbd.Kind], bool] = lambda _: True


@pytest.fixture
def world() -> Iterator[World]:
    """A server that serves, ended with its connection."""
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    world = World(ours)

    def serve() -> None:
        with theirs:
            nbd.serve(theirs, world.disk, lambda kind: world.is_powered(kind))

    thread = threading.Thread(target=serve)
    thread.start()
    yield world
    ours.close()
    thread.join()


def test_reads_writes_and_flushes(world: World) -> None:
    """A client sees its size, flush and FUA; what it writes is read at once, and durable after a flush."""
    assert world.client.negotiate() == (_SIZE_BYTES, 1 | 4 | 8)
    assert world.client.ask(_WRITE, 4096, data=b"a" * 1024) == (0, b"")
    assert world.client.ask(_READ, 4096, 2048) == (0, b"a" * 1024 + bytes(1024))
    assert not any(world.durable)
    assert world.client.ask(_FLUSH) == (0, b"")
    assert world.durable[4096:5120] == b"a" * 1024
    assert world.client.ask(_TRIM, 0, 512)[0] != 0
    world.client.send(_DISCONNECT)
    assert world.client.receive(1) == b""


def test_a_flush_without_power_is_not_answered(world: World) -> None:
    """When the power goes before a request, that is not carried out, and the client never hears of it."""
    world.client.negotiate()
    assert world.client.ask(_WRITE, 0, data=b"a" * 512, flags=1) == (0, b"")
    world.is_powered = lambda kind: kind is not nbd.Kind.FLUSH
    assert world.client.ask(_WRITE, 512, data=b"b" * 512) == (0, b"")
    world.client.send(_FLUSH)
    assert world.client.receive(1) == b""
    assert world.disk.read(0, 1024) == b"a" * 512 + b"b" * 512
    assert not any(world.durable[512:])


def test_half_a_write_was_never_written(world: World) -> None:
    """A write of which the client has sent a part when it is killed leaves the disk as it was."""
    world.client.negotiate()
    world.client.send(_WRITE, 0, 4096, b"a" * 2048)
    world.client._connection.shutdown(socket.SHUT_WR)
    assert world.client.receive(1) == b""
    assert world.disk.read(0, 4096) == bytes(4096)
