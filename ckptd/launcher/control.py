"""The launcher's end of its talk with the agent: whole messages, and no exception when the agent is gone."""

from __future__ import annotations

import select
import socket

from ckptd.errors import ProtocolError
from ckptd.launcher.stdio import complain
from ckptd.protocol.codec import Decoder, encode
from ckptd.protocol.messages import Message, parse, to_frame

_READ_BYTES = 64 * 1024
_SEND_DEADLINE_S = 10.0


class Control:
    """The control socket. The agent's loss is a normal event here, not an error: `receive` returns None."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self._decoder = Decoder()
        stream.settimeout(_SEND_DEADLINE_S)

    def send(self, message: Message) -> None:
        """Send a message, in vain when the agent is gone: `receive` learns of that by itself, and the next is told."""
        try:
            self.stream.sendall(encode(to_frame(message)))
        except OSError:
            self._break()

    def receive(self) -> list[Message] | None:
        """Return the messages that have arrived, or None when the agent is gone. Call it when there is something."""
        try:
            data = self.stream.recv(_READ_BYTES)
            return [parse(frame) for frame in self._decoder.feed(data)] if data else None
        except OSError:
            return None
        except ProtocolError as error:
            complain(f"lost the agent: {error}")
            return None

    def receive_now(self) -> list[Message] | None:
        """Return what has arrived, which may be nothing yet; None when the agent is gone."""
        poll = select.poll()
        poll.register(self.stream, select.POLLIN)
        return self.receive() if poll.poll(0) else []

    def close(self) -> None:
        """Close this process's copy of the socket."""
        self.stream.close()

    def _break(self) -> None:
        # After half a frame nothing that follows could be understood, so the reading side must see an end as well.
        try:
            self.stream.shutdown(socket.SHUT_RDWR)
        except OSError:
            return
