"""A non-blocking connection in the agent's event loop: messages and descriptors, both ways.

asyncio's streams can't pass descriptors, so this is the little that is needed on top of the loop's readers and
writers. Bounded: a peer that sends too much is refused by the codec, one that doesn't read is closed.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

from ckptd.errors import ProtocolError
from ckptd.protocol.channel import receive
from ckptd.protocol.codec import Decoder, encode
from ckptd.protocol.messages import Message, parse, to_frame

_READ_BYTES = 256 * 1024
_MAX_QUEUED_BYTES = 32 * 2**20
_MAX_DESCRIPTORS = 66

OnMessage = Callable[["Connection", Message], None]
OnClose = Callable[["Connection"], None]


class Connection:
    """One peer. `on_message` gets every message in order, `on_close` is called once, with no message after it."""

    def __init__(self, stream: socket.socket, on_message: OnMessage, on_close: OnClose) -> None:
        self._stream = stream
        self._stream.setblocking(False)
        self._on_message = on_message
        self._on_close = on_close
        self._decoder = Decoder()
        self._received: list[int] = []
        """Descriptors that came with a message, which may not be complete yet."""
        self._queue: deque[tuple[bytes, Sequence[int]]] = deque()
        self._queued_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._loop.add_reader(stream, self._readable)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message; the descriptors are duplicated at once, so the caller may close its own."""
        if not self._open:
            return
        data = encode(to_frame(message))
        if self._queued_bytes + len(data) > _MAX_QUEUED_BYTES:
            self.close()
            return
        self._queue.append((data, [os.dup(descriptor) for descriptor in descriptors]))
        self._queued_bytes += len(data)
        self._writable()

    def take_descriptors(self) -> list[int]:
        """Return the descriptors that came with the message that is being handled; the caller closes them.

        Whoever sends some waits for the answer before it sends more.
        """
        taken, self._received = self._received, []
        return taken

    def close(self) -> None:
        """Close now; what is queued is dropped."""
        if not self._open:
            return
        self._open = False
        _close_all(self.take_descriptors())
        self._loop.remove_reader(self._stream)
        self._loop.remove_writer(self._stream)
        self._stream.close()
        for _, descriptors in self._queue:
            _close_all(descriptors)
        self._queue.clear()
        self._on_close(self)

    def _readable(self) -> None:
        try:
            data, descriptors = receive(self._stream, _READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self.close()
            return
        self._received += descriptors
        try:
            for frame in self._decoder.feed(data):
                if not self._open:
                    return
                self._on_message(self, parse(frame))
        except ProtocolError:
            self.close()  # the stream has no known boundary any more
        if not self._decoder.pending_bytes:
            _close_all(self.take_descriptors())  # nobody wanted them
        elif len(self._received) > _MAX_DESCRIPTORS:
            self.close()

    def _writable(self) -> None:
        while self._queue:
            data, descriptors = self._queue[0]
            try:
                if descriptors:
                    sent = socket.send_fds(self._stream, [data], list(descriptors))
                else:
                    sent = self._stream.send(data)
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self._stream, self._writable)
                return
            except OSError:
                self.close()
                return
            _close_all(descriptors)
            self._queued_bytes -= sent
            if sent < len(data):
                self._queue[0] = (data[sent:], ())
            else:
                self._queue.popleft()
        self._loop.remove_writer(self._stream)


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
