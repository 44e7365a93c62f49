"""A blocking connection with deadlines, for the sides that wait: ranks, the launcher and `ckptctl`."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from typing import TypeVar

from ckptd.errors import AgentError, ProtocolError, from_json
from ckptd.protocol import endpoint
from ckptd.protocol.codec import Decoder, encode
from ckptd.protocol.messages import Hello, Message, Refused, Welcome, check_version, parse, to_frame

Kind = TypeVar("Kind", bound=Message)
_READ_BYTES = 256 * 1024
_MAX_DESCRIPTORS = 66
_INT_BYTES = 4


class Channel:
    """One stream socket that carries messages, and descriptors beside them.

    Descriptors arrive in the order in which messages that own them were sent; `take_descriptors` hands them out.
    """

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self._decoder = Decoder()
        self._ready: list[Message] = []
        self._descriptors: list[int] = []

    def send(self, message: Message, deadline_s: float) -> None:
        """Send one message within `deadline_s`; raises `AgentError` when the peer is gone or stuck, and closes."""
        self._check_open()
        self._send(encode(to_frame(message)), deadline_s)

    def _send(self, data: bytes, deadline_s: float) -> None:
        try:
            self.stream.settimeout(deadline_s)
            self.stream.sendall(data)
        except BaseException as error:  # that of a signal's handler, too
            self.close()  # half a message may be out, and the next would be read as its rest
            if isinstance(error, OSError):
                raise _gone("did not take a message", error) from error
            raise

    def receive(self, deadline_s: float) -> Message:
        """Return the next message within `deadline_s`; raises `AgentError` when there is none."""
        self._check_open()
        end_s = time.monotonic() + deadline_s
        while not self._ready:
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                raise AgentError(f"the agent did not answer within {deadline_s:g} s")
            try:
                self.stream.settimeout(left_s)
                data, descriptors = receive(self.stream, _READ_BYTES)
            except TimeoutError:
                continue
            except OSError as error:
                raise _gone("broke the connection", error) from error
            self._descriptors += descriptors
            if not data:
                raise AgentError("the agent closed the connection")
            self._ready += [parse(frame) for frame in self._decoder.feed(data)]
        return self._ready.pop(0)

    def call(self, message: Message, deadline_s: float) -> Message:
        """Send a request and return its answer; a `Refused` answer is raised as the error that it carries."""
        self._check_open()
        data = encode(to_frame(message))
        try:
            self._send(data, deadline_s)
            answer = self.receive(deadline_s)
        except BaseException:
            self.close()  # an answer that comes late would be taken for that of the next call
            raise
        if isinstance(answer, Refused):
            raise from_json(answer.error)
        return answer

    def send_with(self, message: Message, descriptors: Sequence[int], deadline_s: float) -> None:
        """Send a message with descriptors, which stay the caller's; raises `AgentError` as `send` does."""
        self._check_open()
        data = encode(to_frame(message))
        try:
            self.stream.settimeout(deadline_s)
            sent = socket.send_fds(self.stream, [data], list(descriptors))
            self.stream.sendall(data[sent:])
        except OSError as error:
            self.close()
            raise _gone("did not take a message", error) from error

    def poll(self) -> Message | None:
        """Return the next message if it has arrived; raises `AgentError` when the peer is gone."""
        self._check_open()
        try:
            self.stream.settimeout(0.0)
            while not self._ready:
                data, descriptors = receive(self.stream, _READ_BYTES)
                self._descriptors += descriptors
                if not data:
                    raise AgentError("the agent closed the connection")
                self._ready += [parse(frame) for frame in self._decoder.feed(data)]
        except BlockingIOError:
            return None
        except OSError as error:
            raise _gone("broke the connection", error) from error
        return self._ready.pop(0)

    def take_descriptors(self, count: int) -> list[int]:
        """Return `count` descriptors that came with the message just received; the caller closes them."""
        if len(self._descriptors) < count:
            raise ProtocolError(f"{count} descriptors were announced, {len(self._descriptors)} arrived")
        taken, self._descriptors = self._descriptors[:count], self._descriptors[count:]
        return taken

    def _check_open(self) -> None:
        if self.stream.fileno() < 0:
            raise AgentError("the connection to the agent is closed")

    def close(self) -> None:
        """Close the connection and every descriptor that nobody took."""
        for descriptor in self._descriptors:
            close_if_open(descriptor)
        self._descriptors = []
        with contextlib.suppress(OSError):  # as in `close_if_open`
            self.stream.close()


def close_if_open(descriptor: int) -> None:
    """Close a descriptor of a rank's, unless the user's code has: there is some that closes all that it finds."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def open_channel(path: str, role: str, deadline_s: float) -> tuple[Channel, Welcome]:
    """Connect to the agent at `path` and greet it; raises `OSError` when nobody listens there."""
    channel = Channel(endpoint.connect(path, deadline_s))
    try:
        answer = expect(channel.call(Hello(role, os.getpid()), deadline_s), Welcome)
        check_version(answer.version, "the agent")
    except BaseException:
        channel.close()
        raise
    return channel, answer


def expect(answer: Message, kind: type[Kind]) -> Kind:
    """Return `answer` when it is of `kind`; raises `ProtocolError` that names both."""
    if not isinstance(answer, kind):
        raise ProtocolError(f"the agent answered with {type(answer).__name__} where {kind.__name__} was due")
    return answer


def receive(stream: socket.socket, most_bytes: int) -> tuple[bytes, list[int]]:
    """Receive bytes and descriptors, which no program that this process starts shall inherit.

    `socket.recv_fds` can't do that: it ignores its flags.
    """
    room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * _INT_BYTES)
    data, extras, _, _ = stream.recvmsg(most_bytes, room, socket.MSG_CMSG_CLOEXEC)
    descriptors: list[int] = []
    for level, kind, packed in extras:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors += memoryview(packed[: len(packed) // _INT_BYTES * _INT_BYTES]).cast("i")
    return data, descriptors


def _gone(what: str, error: OSError) -> AgentError:
    reason = "deadline passed" if isinstance(error, TimeoutError) else error.strerror or str(error)
    return AgentError(f"the agent {what}: {reason}")
