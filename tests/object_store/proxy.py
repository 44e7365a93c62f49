"""A small HTTP/1.1 proxy in front of an S3 server, with faults: what it forwards, the Host header too, is unchanged.

Signatures stay valid, since clients that are given the proxy as their endpoint sign its name and the server is told
just that name. Each connection has a thread and a connection to the server of its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from tests.object_store.faults import Answer, Drip, Fault, Flip, LoseAnswer, Reset, Rule, Stall, Swallow, Truncate

_PIECE_BYTES = 2**16
_RESET = struct.pack("ii", 1, 0)
_PASSED_S = 0.05


class _BrokenError(Exception):
    """Raised to end a connection; with `reset` in the way that the other side notices at once."""

    def __init__(self, *, reset: bool = True) -> None:
        super().__init__()
        self.reset = reset


@dataclass
class Request:
    """One request that came by."""

    kind: str
    """"put", "part", "begin", "complete", "abort", "get", "head", "list", "uploads", "parts" or "delete"."""
    key: str
    body_bytes: int
    covered: frozenset[str]
    """The headers that its signature covers; "body" when that covers the bytes themselves."""
    status: int | None = None
    """What was answered, by whomever; None where nothing was."""
    fault: Fault | None = None


def covered_by(head: bytes) -> frozenset[str]:
    """Return what the signature of a request covers, so that nobody in between can change it."""
    signed = re.search(r"SignedHeaders=([^,]*)", (header(head, b"Authorization") or b"").decode())
    payload = (header(head, b"x-amz-content-sha256") or b"").decode()
    names = frozenset(signed[1].split(";")) if signed else frozenset()
    return names | ({"body"} if re.fullmatch(r"[0-9a-f]{64}", payload) else frozenset())


def kind_of(method: str, target: str) -> tuple[str, str]:
    """Return what a request is, and the key in its bucket."""
    parts = urlsplit(target)
    query = parse_qs(parts.query, keep_blank_values=True)
    key = unquote(parts.path).lstrip("/").partition("/")[2]
    if "partNumber" in query and method == "PUT":
        return "part", key
    if "uploads" in query:
        return ("begin" if method == "POST" else "uploads"), key
    if "uploadId" in query:
        return {"POST": "complete", "DELETE": "abort"}.get(method, "parts"), key
    if "list-type" in query or not key:
        return ("list" if method == "GET" else method.lower()), "".join(query.get("prefix", ()))
    return method.lower(), key


class Proxy:
    """Forwards to `upstream`, a host and port, until it is closed."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self._upstream = upstream
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closing = False
        self.requests: list[Request] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        # Little room, or the kernel takes whole parts at once and nobody sees how slowly they are read.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _PIECE_BYTES)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._accepting = threading.Thread(target=self._accept, name="proxy")
        self._accepting.start()

    # --- for tests ------------------------------------------------------------------------------------------------

    def add(self, fault: Fault, *kinds: str, key: str = "", skip: int = 0, times: float = float("inf")) -> Rule:
        """Have a fault happen to requests of these kinds (none: all); the first that fits holds."""
        rule = Rule(fault, frozenset(kinds), re.compile(key), skip, times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Let everything pass, and forget what came by."""
        with self._lock:
            rules, self._rules = self._rules, []
            self.requests = []
        for rule in rules:
            rule.end()

    def counts(self) -> Counter[str]:
        """Return how many requests of each kind came by."""
        with self._lock:
            return Counter(request.kind for request in self.requests)

    def close(self) -> None:
        """End all connections and threads."""
        self._closing = True
        self.clear()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        with self._lock:
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    # --- connections ----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,), name="proxied")
            self._threads = [one for one in self._threads if one.is_alive()] + [thread]
            thread.start()

    @contextlib.contextmanager
    def _tracked(self, one: socket.socket) -> Iterator[socket.socket]:
        with self._lock:
            self._open.add(one)
        try:
            yield one
        finally:
            with self._lock:
                self._open.discard(one)
            one.close()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), self._tracked(client):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.ExitStack() as stack:
                try:
                    exchange = _Exchange(self, _Side(client), lambda: self._reach(stack))
                    while not self._closing and exchange.one():
                        pass
                except _BrokenError as broken:
                    if broken.reset:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def _reach(self, stack: contextlib.ExitStack) -> _Side:
        server = stack.enter_context(self._tracked(socket.create_connection(self._upstream)))
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _Side(server)

    def met(self, request: Request) -> Rule | None:
        """Note a request, and return the rule that is for it."""
        with self._lock:
            self.requests.append(request)
            rule = next((rule for rule in self._rules if rule.meets(request.kind, request.key)), None)
        request.fault = None if rule is None else rule.fault
        return rule


class _Side:
    """A connection, read with a memory of what came too early."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._ahead = b""

    def head(self) -> bytes:
        """Return everything up to the blank line, nothing when the connection ends before."""
        while b"\r\n\r\n" not in self._ahead:
            more = self.connection.recv(_PIECE_BYTES)
            if not more:
                return b""
            self._ahead += more
        found, blank, self._ahead = self._ahead.partition(b"\r\n\r\n")
        return found + blank

    def some(self, at_most: int) -> bytes:
        """Return some bytes, none at the end of the connection."""
        if not self._ahead:
            return self.connection.recv(min(at_most, _PIECE_BYTES))
        found, self._ahead = self._ahead[:at_most], self._ahead[at_most:]
        return found

    def line(self) -> bytes:
        """Return a line with its end."""
        while b"\n" not in self._ahead:
            more = self.connection.recv(_PIECE_BYTES)
            if not more:
                raise _BrokenError
            self._ahead += more
        found, end, self._ahead = self._ahead.partition(b"\n")
        return found + end

    def body(self, head: bytes, *, is_answer: bool, bodiless: bool) -> Iterator[bytes]:
        """Yield a body as it comes, with the lengths of its chunks if it has any."""
        if bodiless:
            return
        if b"chunked" in (header(head, b"Transfer-Encoding") or b"").lower():
            while True:
                line = self.line()
                yield line
                left = int(line.partition(b";")[0], 16) + 2
                last = left == 2
                while left:
                    piece = self.some(left)
                    if not piece:
                        raise _BrokenError
                    left -= len(piece)
                    yield piece
                if last:
                    return
        length = header(head, b"Content-Length")
        left = float("inf") if length is None and is_answer else int(length or 0)
        while left:
            piece = self.some(int(min(left, _PIECE_BYTES)))
            if not piece:
                if left == float("inf"):
                    return
                raise _BrokenError
            left -= len(piece)
            yield piece


class _Exchange:
    """Requests of one connection, one after the other."""

    def __init__(self, proxy: Proxy, client: _Side, reach: Callable[[], _Side]) -> None:
        self._proxy, self._client, self._reach = proxy, client, reach

    @functools.cached_property
    def _server(self) -> _Side:
        """The other end, reached with the first request that goes there: what is answered here needs none."""
        return self._reach()

    def one(self) -> bool:
        """Serve a request; return whether another may follow."""
        head = self._client.head()
        if not head:
            return False
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        kind, key = kind_of(method, target)
        request = Request(kind, key, int(header(head, b"Content-Length") or 0), covered_by(head))
        rule = self._proxy.met(request)
        if header(head, b"Expect"):
            self._client.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"\r\nExpect:[^\r]*", b"", head, flags=re.IGNORECASE)
        fault = None if rule is None else rule.fault
        sent = self._client.body(head, is_answer=False, bodiless=False)
        sent = self._faulty(sent, rule, answer=False)
        if isinstance(fault, Answer | Swallow):
            body = b"".join(sent)
            said = _refusal(fault, key) if isinstance(fault, Answer) else _success(kind, key, body)
            request.status = int(said.split(b" ", 2)[1])
            if method == "HEAD":
                said = said.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
            self._client.connection.sendall(said)
            return True
        return self._forward(request, rule, method, head, sent)

    def _forward(self, request: Request, rule: Rule | None, method: str, head: bytes, sent: Iterator[bytes]) -> bool:
        fault = None if rule is None else rule.fault
        server = self._server.connection
        server.sendall(head)
        for piece in sent:
            server.sendall(piece)
        answer = self._server.head()
        while answer.startswith(b"HTTP/1.1 100"):
            answer = self._server.head()
        if not answer:
            raise _BrokenError
        status = int(answer.split(b" ", 2)[1])
        bodiless = method == "HEAD" or status in (204, 304)
        came = self._server.body(answer, is_answer=True, bodiless=bodiless)
        if isinstance(fault, LoseAnswer):
            for _ in came:
                pass
            raise _BrokenError
        if isinstance(fault, Reset | Stall) and fault.answer and not fault.after_bytes:
            came = self._faulty(came, rule, answer=True)  # before the first byte is before the head
            first = next(came, b"")
            self._client.connection.sendall(answer + first)
        else:
            self._client.connection.sendall(answer)
            came = self._faulty(came, rule, answer=True)
        for piece in came:
            self._client.connection.sendall(piece)
        request.status = status
        return b"close" not in (header(answer, b"Connection") or b"").lower()

    def _faulty(self, pieces: Iterator[bytes], rule: Rule | None, *, answer: bool) -> Iterator[bytes]:
        """Yield a body with what the fault does to it."""
        fault = None if rule is None else rule.fault
        if isinstance(fault, Truncate):
            return _until(pieces, fault.after_bytes, reset=False) if answer else pieces
        if rule is None or not isinstance(fault, Reset | Stall | Flip | Drip) or fault.answer != answer:
            return pieces
        if isinstance(fault, Reset):
            return _until(pieces, fault.after_bytes, reset=True)
        if isinstance(fault, Stall):
            return self._stalled(pieces, fault, rule)
        return _flipped(pieces, fault.at) if isinstance(fault, Flip) else _dripped(pieces, fault, rule)

    def _stalled(self, pieces: Iterator[bytes], fault: Stall, rule: Rule) -> Iterator[bytes]:
        """Wait once so many bytes have passed; a client that has given up meanwhile is not served any more."""
        at = 0
        passed = not fault.after_bytes and self._wait(fault, rule)
        for piece in pieces:
            at += len(piece)
            passed = passed or (at >= fault.after_bytes and self._wait(fault, rule))
            yield piece
        if not passed:
            self._wait(fault, rule)

    def _wait(self, fault: Stall, rule: Rule) -> bool:
        rule.ended.wait(fault.seconds)
        client = self._client.connection
        ready, _, _ = select.select([client], [], [], 0)
        if ready and not client.recv(1, socket.MSG_PEEK):
            raise _BrokenError
        return True


def _until(pieces: Iterator[bytes], after_bytes: int, *, reset: bool) -> Iterator[bytes]:
    at = 0
    if after_bytes:
        for piece in pieces:
            kept = piece[: after_bytes - at]
            at += len(kept)
            yield kept
            if at == after_bytes:
                break
    time.sleep(_PASSED_S)  # what was sent must have been read, or the reset overtakes it
    raise _BrokenError(reset=reset)


def _flipped(pieces: Iterator[bytes], position: int) -> Iterator[bytes]:
    at = 0
    for piece in pieces:
        if at <= position < at + len(piece):
            changed = bytearray(piece)
            changed[position - at] ^= 1
            yield bytes(changed)
        else:
            yield piece
        at += len(piece)


def _dripped(pieces: Iterator[bytes], fault: Drip, rule: Rule) -> Iterator[bytes]:
    for piece in pieces:
        rule.ended.wait(len(piece) / fault.bytes_per_s)
        yield piece


def header(head: bytes, name: bytes) -> bytes | None:
    """Return the value of a header."""
    found = re.search(rb"\r\n" + re.escape(name) + rb":[ \t]*([^\r]*)\r\n", head, re.IGNORECASE)
    return None if found is None else found[1]


def _answer(status: int, reason: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} {reason}", f"Content-Length: {len(body)}", "Content-Type: application/xml", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _refusal(fault: Answer, key: str) -> bytes:
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{fault.code}</Code><Message>The proxy says so.'
        f"</Message><Resource>/{key}</Resource><RequestId>1</RequestId></Error>"
    )
    return _answer(fault.status, "Fault", body.encode())


def _success(kind: str, key: str, body: bytes) -> bytes:
    etag = f'"{hashlib.md5(body).hexdigest()}"'
    if kind == "complete":
        said = f"<CompleteMultipartUploadResult><Key>{key}</Key><ETag>{etag}</ETag></CompleteMultipartUploadResult>"
        return _answer(200, "OK", said.encode())
    return _answer(200, "OK", b"", f"ETag: {etag}")
