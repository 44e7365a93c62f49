"""The agent's unix socket: mode 0600, peers of the same user only, greeted before anything else."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ckptd.daemon.connection import Connection
from ckptd.errors import AgentError, CkptdError, FencedError
from ckptd.protocol import endpoint
from ckptd.protocol.messages import Hello, Message, Refused, Welcome, check_version
from ckptd.storage.holding import Holds

_BACKLOG = 256
_CREDENTIALS = struct.Struct("3i")


@dataclass(slots=True, eq=False)
class Peer:
    """A greeted connection: who it is by the kernel's word, and what the agent has attached to it."""

    connection: Connection
    pid: int
    role: str = ""

    def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Send a message to this peer."""
        self.connection.send(message, descriptors)

    def refuse(self, error: CkptdError) -> None:
        """Answer a request with the reason why it isn't done."""
        self.connection.send(Refused(error.to_json()))


class Server:
    """Listens at `path`. `on_message(peer, message)` and `on_close(peer)` are called for greeted peers.

    `on_foreign(pid, error)` is called when a process can't be talked to, since it is of another version.
    """

    def __init__(
        self,
        path: Path,
        frameworks: list[dict[str, str]],
        on_message: Callable[[Peer, Message], None],
        on_close: Callable[[Peer], None],
        on_foreign: Callable[[int, CkptdError], None] = lambda *_: None,
    ) -> None:
        self.path = path
        self.peers: set[Peer] = set()
        self._frameworks = frameworks
        self._on_message = on_message
        self._on_close = on_close
        self._on_foreign = on_foreign
        self._by_connection: dict[Connection, Peer] = {}
        self._place = Holds()
        self._stream = _listen(path, self._place)
        asyncio.get_running_loop().add_reader(self._stream, self._accept)

    def _accept(self) -> None:
        try:
            stream, _ = self._stream.accept()
        except OSError:
            return  # gone again before we came, or out of descriptors: the next one may do
        credentials = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(credentials)
        if uid not in (os.getuid(), 0):
            stream.close()
            return
        connection = Connection(stream, self._received, self._closed)
        self._by_connection[connection] = Peer(connection, pid)

    def _received(self, connection: Connection, message: Message) -> None:
        peer = self._by_connection[connection]
        if peer.role:
            self._on_message(peer, message)
            return
        try:
            if not isinstance(message, Hello):
                raise AgentError("a connection must begin with a hello")
            check_version(message.version, "this client")
        except CkptdError as error:
            peer.refuse(error)
            connection.close()
            self._on_foreign(peer.pid, error)
            return
        peer.role = message.role
        self.peers.add(peer)
        peer.send(Welcome(os.getpid(), self._frameworks))

    def _closed(self, connection: Connection) -> None:
        peer = self._by_connection.pop(connection)
        if peer in self.peers:
            self.peers.discard(peer)
            self._on_close(peer)

    def close(self) -> None:
        """Stop listening, close every connection and remove the socket's name."""
        asyncio.get_running_loop().remove_reader(self._stream)
        self.path.unlink(missing_ok=True)  # while nobody can take our place: later it could be our successor's
        self._stream.close()
        for connection in list(self._by_connection):
            connection.close()
        self._place.close()


def _listen(path: Path, place: Holds) -> socket.socket:
    """Listen at `path`, and hold that place: a name says nothing of who is behind it, a lock ends with its holder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        place.take(f"the place {path}", path.with_suffix(".held"), 0.0)
        path.unlink(missing_ok=True)
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)
        try:
            with endpoint.short_name(str(path)) as name:
                stream.bind(name)
        finally:
            os.umask(before)
        stream.listen(_BACKLOG)
    except FencedError as error:
        raise AgentError(
            f"another agent listens at {path}", hint="stop it, or set CKPTD_SOCKET to another place"
        ) from error
    except OSError as error:
        place.close()
        raise AgentError(
            f"can't listen at {path}: {error.strerror}", hint="set CKPTD_SOCKET to another place"
        ) from error
    return stream
