"""A gate before an S3 server: lets every request of an agent through, counts it, and kills the agent at the n-th.

It works on whole requests and whole answers. "kill before": the server never sees the request. "kill after": the
server has answered, and the agent dies before it hears.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from tests.crash.calls import Harm

_PATIENCE_S = 10.0
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """A request that was let through, with what the server said."""

    number: int
    method: str
    key: str
    query: str
    status: int
    body: bytes = field(repr=False)


class Gate:
    """Listens on loopback. `arm` says what happens to whom; requests before that wait for it. `calm` ends it."""

    def __init__(self, upstream: str) -> None:
        found = urlsplit(upstream)
        self._upstream = (str(found.hostname), int(found.port or 80))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._lock = threading.Condition()
        self._armed = threading.Event()
        self._harm, self._pid, self._count, self._under_way = Harm(), 0, 0, 0
        self._requests: list[Request] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def disarm(self) -> None:
        """Have requests wait: the next agent is about to be started."""
        self._armed.clear()

    def arm(self, pid: int, harm: Harm) -> None:
        """Count anew, and let requests through."""
        with self._lock:
            self._harm, self._pid, self._count, self._requests = harm, pid, 0, []
        self._armed.set()

    def calm(self) -> list[Request]:
        """Do no harm any more: the agent has ended. Return what it has asked for, also what the server still does."""
        with self._lock:
            self._lock.wait_for(lambda: not self._under_way, _PATIENCE_S)
            self._harm, requests, self._requests = Harm(), self._requests, []
        return requests

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown(socket.SHUT_RDWR)  # or the thread would wait in `accept` for good
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._server.accept()[0]
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(self._upstream) as upstream:
            for one in (client, upstream):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            asking, answering = _Reader(client), _Reader(upstream)
            while request := asking.message():
                self._armed.wait()
                with self._lock:
                    self._count += 1
                    self._under_way += 1
                    number, harm, pid = self._count, self._harm, self._pid
                try:
                    answer = self._pass_on(number, harm, pid, request, upstream, answering)
                finally:
                    with self._lock:
                        self._under_way -= 1
                        self._lock.notify_all()
                if not answer:
                    return
                client.sendall(b"".join(answer))

    def _pass_on(
        self, number: int, harm: Harm, pid: int, request: Sequence[bytes], upstream: socket.socket, answering: _Reader
    ) -> Sequence[bytes]:
        """Return the server's answer to a request, nothing when there is none or the agent was killed."""
        if harm.hits(number) and harm.what == "kill before":
            os.kill(pid, signal.SIGKILL)
            return ()
        upstream.sendall(b"".join(request))
        method, target = request[0].split(b" ")[:2]
        answer = answering.message(has_body=method != b"HEAD")
        while answer and answer[0].startswith(b"HTTP/1.1 100"):
            answer = answering.message()
        if not answer:
            return ()
        found = urlsplit(target.decode())
        status = int(answer[0].split(b" ")[1])
        with self._lock:
            self._requests.append(
                Request(number, method.decode(), unquote(found.path), found.query, status, request[1])
            )
        if harm.hits(number) and harm.what == "kill after":
            os.kill(pid, signal.SIGKILL)
            return ()
        return answer


class _Reader:
    """Takes whole messages of HTTP/1.1 from a socket."""

    def __init__(self, source: socket.socket) -> None:
        self._source = source
        self._held = b""

    def message(self, *, has_body: bool = True) -> Sequence[bytes]:
        """Return head and body of the next message, nothing when there is none."""
        head = self._until(b"\r\n\r\n")
        if not head:
            return ()
        length = _LENGTH.search(head)
        if not has_body or re.match(rb"HTTP/1.1 (1\d\d|204|304)", head):
            return head, b""
        if _CHUNKED.search(head):
            return head, self._chunks()
        return head, self._take(int(length[1])) if length else b""

    def _until(self, end: bytes) -> bytes:
        while end not in self._held:
            more = self._source.recv(2**16)
            if not more:
                return b""
            self._held += more
        found, _, self._held = self._held.partition(end)
        return found + end

    def _take(self, size: int) -> bytes:
        parts = [self._held[:size]]
        self._held = self._held[size:]
        left = size - len(parts[0])
        while left:
            more = self._source.recv(min(left, 2**20))
            if not more:
                raise OSError("cut off")
            parts.append(more)
            left -= len(more)
        return b"".join(parts)

    def _chunks(self) -> bytes:
        found = b""
        while True:
            line = self._until(b"\r\n")
            size = int(line.split(b";")[0], 16)
            found += line + self._take(size + 2)
            if size == 0:
                return found
