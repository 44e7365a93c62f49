"""The agent's side of a socket: whole messages in order, descriptors beside them, and an end that is seen once."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from ckptd.daemon import connection as connection_module
from ckptd.daemon.connection import Connection
from ckptd.protocol.channel import Channel
from ckptd.protocol.codec import MAX_FRAME_BYTES, encode
from ckptd.protocol.messages import Done, Lent, Message, Request, to_frame
from tests.daemon.harness import PATIENCE_S, eventually, open_descriptors


class Ends:
    """Both ends of a connection, and what the agent's end has seen."""

    def __init__(self, on_message: Callable[[Connection, Message], None] | None = None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.received: list[Message] = []
        self.closed = 0
        self.connection = Connection(ours, on_message or self._received, self._closed)
        self.stream = theirs
        self.peer = Channel(theirs)

    def _received(self, _: Connection, message: Message) -> None:
        assert not self.closed, "a message after the end"
        self.received.append(message)

    def _closed(self, _: Connection) -> None:
        self.closed += 1

    def close(self) -> None:
        """Close both."""
        self.connection.close()
        self.peer.close()


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test in a loop; no descriptor may be left of it."""
    before = open_descriptors()
    asyncio.run(work)
    assert open_descriptors() == before


def region(text: bytes) -> int:
    """Return a descriptor of memory that holds `text`."""
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(descriptor, text)
    return descriptor


def lend(connection: Connection, message: Message, *texts: bytes) -> None:
    """Send a message with regions, and close our own descriptors at once."""
    descriptors = [region(text) for text in texts]
    connection.send(message, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)


def take(peer: Channel, count: int) -> list[bytes]:
    """Return what the regions hold that came with a message."""
    texts = []
    for descriptor in peer.take_descriptors(count):
        texts.append(os.pread(descriptor, 100, 0))
        os.close(descriptor)
    return texts


def test_descriptors_arrive_with_their_message() -> None:
    """Each message brings its own descriptors, in order, though the sender has closed its copies already."""

    async def work() -> None:
        ends = Ends()
        lend(ends.connection, Lent([0, 1], 10), b"zero", b"one")
        ends.connection.send(Done({"between": 1}))
        lend(ends.connection, Lent([2], 20), b"two")
        assert ends.peer.receive(1.0) == Lent([0, 1], 10)
        assert take(ends.peer, 2) == [b"zero", b"one"]
        assert ends.peer.receive(1.0) == Done({"between": 1})
        assert ends.peer.receive(1.0) == Lent([2], 20)
        assert take(ends.peer, 1) == [b"two"]
        ends.close()

    run(work())


def test_a_thousand_messages_leak_no_descriptor() -> None:
    """What was lent is closed on the agent's side, message after message."""

    async def work() -> None:
        ends = Ends()
        before = open_descriptors()
        shared = region(b"shared")
        for number in range(1000):
            ends.connection.send(Lent([number], 1), (shared, shared))
            assert ends.peer.receive(1.0) == Lent([number], 1)
            for descriptor in ends.peer.take_descriptors(2):
                os.close(descriptor)
        os.close(shared)
        assert open_descriptors() == before
        ends.close()

    run(work())


def test_big_messages_pass_in_pieces() -> None:
    """Messages far beyond the socket's buffer arrive whole and in order, each with its descriptors."""

    async def work() -> None:
        ends = Ends()
        got: list[tuple[Message, list[bytes]]] = []

        def read() -> None:
            for count in (2, 0, 1):
                message = ends.peer.receive(PATIENCE_S)
                got.append((message, take(ends.peer, count)))

        big = Done({"text": "x" * 4_000_000})
        lend(ends.connection, big, b"a", b"b")
        assert ends.connection._queue, "nothing of it had to wait"
        ends.connection.send(big)
        lend(ends.connection, Done({"last": 1}), b"c")
        reader = threading.Thread(target=read)
        reader.start()
        await eventually(lambda: not reader.is_alive())
        assert got == [(big, [b"a", b"b"]), (big, []), (Done({"last": 1}), [b"c"])]
        assert ends.connection._queued_bytes == 0
        ends.close()

    run(work())


def test_a_peer_that_does_not_read_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that lets messages pile up is closed, once, with what waited for it; the agent's memory stays bounded."""
    monkeypatch.setattr(connection_module, "_MAX_QUEUED_BYTES", 2**20)

    async def work() -> None:
        ends = Ends()
        for sent in range(100):  # noqa: B007 - how many it took is looked at below
            lend(ends.connection, Done({"text": "x" * 100_000}), b"waits")
            assert ends.connection._queued_bytes <= 2**20
            if ends.closed:
                break
        assert 5 < sent < 20
        ends.connection.send(Done())
        ends.connection.close()
        assert ends.closed == 1
        ends.peer.close()

    run(work())


@pytest.mark.parametrize(
    "garbage",
    [
        struct.pack(">I", MAX_FRAME_BYTES + 1),
        struct.pack(">I", 3) + b"not",
        struct.pack(">I", 2) + b"[]",
        encode({"type": "nosuch"}),
        encode({"type": "request"}),
        encode({"type": "request", "at_step": "seven"}),
        encode({"type": "request", "at_step": 7, "more": 1}),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_garbage_closes_the_connection(garbage: bytes) -> None:
    """Bytes that are no message end the connection, after the messages before them; nothing is raised in the loop."""

    async def work() -> None:
        ends = Ends()
        ends.stream.sendall(encode(to_frame(Request(1))))
        await eventually(lambda: ends.received)
        ends.stream.sendall(garbage)
        await eventually(lambda: ends.closed)
        assert ends.received == [Request(1)]
        assert ends.stream.recv(1) == b""
        ends.close()
        assert ends.closed == 1

    run(work())


def test_messages_come_whole_however_they_are_cut() -> None:
    """A message that arrives byte by byte is one message, and several in one read are several."""

    async def work() -> None:
        ends = Ends()
        sent = [Request(number) for number in range(5)]
        data = b"".join(encode(to_frame(message)) for message in sent)
        for byte in data:
            ends.stream.sendall(bytes([byte]))
            await asyncio.sleep(0)
        ends.stream.sendall(data)
        await eventually(lambda: len(ends.received) == 10)
        assert ends.received == [*sent, *sent]
        ends.close()

    run(work())


def test_the_last_words_of_a_peer_that_is_gone() -> None:
    """What a peer sent before it closed is handled before its end, which is reported exactly once."""

    async def work() -> None:
        ends = Ends()
        for number in range(100):
            ends.stream.sendall(encode(to_frame(Request(number))))
        ends.peer.close()
        await eventually(lambda: ends.closed)
        assert ends.received == [Request(number) for number in range(100)]
        ends.connection.send(Done())
        ends.connection.close()
        assert ends.closed == 1

    run(work())


def test_a_peer_that_is_gone_while_we_send() -> None:
    """Sending to a peer that has gone closes the connection once and raises nothing."""

    async def work() -> None:
        ends = Ends()
        ends.peer.close()
        lend(ends.connection, Done({"text": "x" * 500_000}), b"lost")
        assert ends.closed == 1
        lend(ends.connection, Done(), b"lost too")
        assert ends.closed == 1

    run(work())


def test_no_message_after_the_end() -> None:
    """When the handler of one message closes the connection, what came with it is not handled any more."""

    async def work() -> None:
        handled: list[Message] = []

        def handle(connection: Connection, message: Message) -> None:
            handled.append(message)
            connection.close()

        ends = Ends(handle)
        ends.stream.sendall(b"".join(encode(to_frame(Request(number))) for number in range(3)))
        await eventually(lambda: ends.closed)
        await asyncio.sleep(0.01)
        assert handled == [Request(0)]
        assert ends.closed == 1
        ends.close()

    run(work())


def test_descriptors_of_a_peer_are_not_taken() -> None:
    """A peer can't fill the agent's table of descriptors: what it sends along is dropped by the kernel."""

    async def work() -> None:
        ends = Ends()
        before = open_descriptors()
        shared = region(b"unwanted")
        for number in range(50):
            socket.send_fds(ends.stream, [encode(to_frame(Request(number)))], [shared] * 10)
        await eventually(lambda: len(ends.received) == 50)
        os.close(shared)
        assert open_descriptors() == before
        ends.close()

    run(work())
