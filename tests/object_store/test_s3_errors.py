"""What goes wrong between a tier and its server: typed, named, in time, and without a credential in any word of it."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ckptd.errors import CkptdError, DamagedError, FencedError, FullError, NotFoundError, RefusedError, StoreError
from ckptd.storage.tier import Tier
from ckptd_plugins.storage_s3 import open_s3
from tests.object_store import server
from tests.object_store.server import Server

PART_BYTES = 5 * 2**20
LARGE = b"x" * (PART_BYTES * 2 + 1)


@pytest.fixture
def open_tier(s3_url: str) -> Iterator[Callable[..., Tier]]:
    """Opens tiers at a test's own place, by the environment as it is then, and closes them."""
    opened: list[Tier] = []

    def open_one(url: str = s3_url, **options: object) -> Tier:
        opened.append(open_s3(url, {"part_bytes": PART_BYTES, **options}))
        return opened[-1]

    yield open_one
    for tier in opened:
        tier.close()


def everything(tier: Tier) -> dict[str, Callable[[], object]]:
    """Every call that asks the server something."""
    return {
        "put": lambda: tier.put("x", b"1"),
        "put large": lambda: tier.put("x", LARGE),
        "create": lambda: tier.put("x", b"1", create_only=True),
        "get": lambda: tier.get("x"),
        "size": lambda: tier.size_bytes("x"),
        "read": lambda: tier.read_into("x", 0, memoryview(bytearray(1))),
        "open": lambda: tier.open("x"),
        "list": lambda: list(tier.list("")),
        "delete": lambda: tier.delete("x"),
        "sweep": lambda: tier.sweep("", 0.0),
        "check": tier.check_writable,
    }


def test_a_wrong_secret_is_refused(open_tier: Callable[..., Tier], monkeypatch: pytest.MonkeyPatch) -> None:
    """No call passes with a wrong secret; each says that it is refused, and neither secret is in any of its words."""
    wrong = "a-wrong-secret-that-must-not-be-seen"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", wrong)
    tier = open_tier()
    for name, call in everything(tier).items():
        with pytest.raises(RefusedError) as caught:
            call()
        assert not caught.value.retryable, name
        assert caught.value.hint, name
        said = "".join(traceback.format_exception(caught.value)) + str(caught.value.to_json())
        assert wrong not in said
        assert server.SECRET_KEY not in said
        assert tier.url in said


def test_no_credentials_are_refused(open_tier: Callable[..., Tier], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials nothing is tried for long: it is refused, with a hint where they come from."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RefusedError, match="no usable credentials") as caught:
        open_tier().check_writable()
    assert "AWS_ACCESS_KEY_ID" in str(caught.value.hint)
    with pytest.raises(RefusedError, match="ProfileNotFound"):
        open_tier(profile="nobody").check_writable()


def test_anonymous_requests_are_not_signed(open_tier: Callable[..., Tier]) -> None:
    """`anon` leaves the credentials of the environment out, which this server then refuses."""
    with pytest.raises(RefusedError, match="AccessDenied"):
        open_tier(anon=True).put("x", b"1")


def test_a_missing_bucket_is_refused(open_tier: Callable[..., Tier]) -> None:
    """A bucket that isn't there is named, by every call that the server gives a reason to."""
    tier = open_tier("s3://there-is-no-such-bucket/p")
    for name, call in everything(tier).items():
        if name in ("size", "open"):  # HEAD answers 404 and no more
            with pytest.raises(NotFoundError):
                call()
            continue
        with pytest.raises(RefusedError, match="NoSuchBucket") as caught:
            call()
        assert "there-is-no-such-bucket" in caught.value.message
        assert caught.value.hint == "make the bucket, or use another --store"


def test_a_profile_is_used(
    open_tier: Callable[..., Tier], s3_server: Server, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials, region and endpoint may all come from a profile in the files of AWS."""
    for name in s3_server.environ:
        monkeypatch.delenv(name)
    config = tmp_path / "config"
    config.write_text(
        f"[profile tests]\naws_access_key_id = {server.ACCESS_KEY}\naws_secret_access_key = {server.SECRET_KEY}\n"
        f"region = {server.REGION}\nendpoint_url = {s3_server.endpoint}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    tier = open_tier(profile="tests", addressing="path")
    tier.put("x", b"1")
    assert tier.get("x") == b"1"
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, s3_server.environ[name])
    assert open_tier(endpoint=s3_server.endpoint, region=server.REGION).get("x") == b"1"


def test_credentials_are_in_no_words(
    open_tier: Callable[..., Tier], s3_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the tier's description nor what s3fs and we log holds a secret."""
    with caplog.at_level(logging.DEBUG, logger="s3fs"):
        tier = open_tier()
        tier.put("x", b"1")
        tier.get("x")
    for said in (repr(tier), str(tier), tier.url, str(vars(tier)), caplog.text):
        assert server.SECRET_KEY not in said
        assert server.ACCESS_KEY not in said


def test_a_stopped_server_is_an_error_in_time(open_tier: Callable[..., Tier], s3_server: Server) -> None:
    """While the server stands still every call ends by its timeout as something that passes, and then it does."""
    tier, patient = open_tier(timeout=1, connect_timeout=1), open_tier()
    patient.put("x", LARGE)
    s3_server.stand_still()
    try:
        for name, call in everything(tier).items():
            begun_s = time.monotonic()
            with pytest.raises(StoreError, match="in time") as caught:
                call()
            assert time.monotonic() - begun_s < 8, name
            assert caught.value.retryable
            assert tier.url in caught.value.message
    finally:
        s3_server.go_on()
    patient.put("y", LARGE)
    assert patient.get("y") == LARGE


def test_a_server_that_stops_in_the_middle(open_tier: Callable[..., Tier], s3_server: Server) -> None:
    """A put whose server stands still between its parts ends in time, and is continued later."""
    open_tier().put("before", LARGE)  # it may be busy yet with what was given up while it stood still for another test
    tier = open_tier(timeout=8, connect_timeout=8, parts_in_flight=1)
    stopped: list[int] = []

    def stop(size_bytes: int) -> None:
        stopped.append(size_bytes)
        if len(stopped) == 2:
            s3_server.stand_still()

    begun_s = time.monotonic()
    try:
        with pytest.raises(StoreError, match="part 2 of"):
            tier.put("x", LARGE, pace=stop)
    finally:
        s3_server.go_on()
    assert time.monotonic() - begun_s < 40
    asked: list[int] = []
    tier.put("x", LARGE, pace=asked.append)
    assert sum(asked) <= len(LARGE) - PART_BYTES
    assert tier.get("x") == LARGE


def test_nobody_listens(open_tier: Callable[..., Tier]) -> None:
    """An endpoint where nothing listens is unreachable, which may pass."""
    for call in everything(open_tier(endpoint="http://127.0.0.1:9", region="x")).values():
        with pytest.raises(StoreError, match="can't be reached") as caught:
            call()
        assert caught.value.retryable


def test_close_ends_what_waits(open_tier: Callable[..., Tier], s3_server: Server) -> None:
    """A call that waits for the server fails when the tier is closed, at once, and so does every later one."""
    tier = open_tier(timeout=60)
    tier.put("x", b"1")
    raised: list[BaseException] = []

    def call() -> None:
        try:
            tier.get("x")
        except CkptdError as error:
            raised.append(error)

    s3_server.stand_still()
    try:
        thread = threading.Thread(target=call)
        thread.start()
        time.sleep(0.3)
        tier.close()
        thread.join(5)
    finally:
        s3_server.go_on()
    assert isinstance(raised[0], StoreError)
    with pytest.raises(StoreError, match="is closed"):
        tier.get("x")


def answer(status: int, code: str, message: str = "said by the server") -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@contextmanager
def answering(said: bytes, **by_method: bytes) -> Iterator[tuple[str, list[str]]]:
    """An HTTP server on loopback that says one thing to all: what no healthy server can be made to say."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            head, blank, body = by_method.get(self.command, said).partition(b"\r\n\r\n")
            self.wfile.write(head + blank + (b"" if self.command == "HEAD" else body))

        def log_message(self, *_: object) -> None:
            pass

    for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.answer)
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_address[1]}", asked
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


@pytest.mark.parametrize(
    ("status", "code", "kind", "retryable"),
    [
        (500, "InternalError", StoreError, True),
        (503, "SlowDown", StoreError, True),
        (503, "ServiceUnavailable", StoreError, True),
        (502, "Whatever", StoreError, True),
        (429, "TooManyRequests", StoreError, True),
        (400, "RequestTimeout", StoreError, True),
        (400, "BadDigest", StoreError, True),
        (507, "XMinioStorageFull", FullError, True),
        (403, "AccessDenied", RefusedError, False),
        (403, "InvalidAccessKeyId", RefusedError, False),
        (400, "ExpiredToken", RefusedError, False),
        (403, "RequestTimeTooSkewed", RefusedError, False),
        (400, "AuthorizationHeaderMalformed", RefusedError, False),
        (501, "NotImplemented", RefusedError, False),
        (404, "NoSuchBucket", RefusedError, False),
        (412, "PreconditionFailed", FencedError, False),
        (404, "NoSuchKey", NotFoundError, False),
        (416, "InvalidRange", DamagedError, False),
    ],
)
def test_answers_of_a_server(
    open_tier: Callable[..., Tier], status: int, code: str, kind: type[CkptdError], retryable: bool
) -> None:
    """Every kind of refusal becomes the error that the contract has for it, after one request."""
    with answering(answer(status, code)) as (endpoint, asked):
        tier = open_tier(endpoint=endpoint)
        with pytest.raises(kind) as caught:
            tier.put("job/x", b"1", create_only=True)
    assert type(caught.value).retryable is retryable
    assert f"{tier.url}/job/x" in caught.value.message
    assert [line[:4] for line in asked if not line.startswith("HEAD")] == ["PUT "], "the client tried again by itself"


def test_a_conflict_is_decided_by_looking(open_tier: Callable[..., Tier]) -> None:
    """409 means that the server did not decide: a lost claim if the key is there now, else it may be tried again."""
    undecided = answer(409, "ConditionalRequestConflict")
    there = b'HTTP/1.1 200 OK\r\nETag: "x"\r\nContent-Length: 1\r\n\r\n1'
    with answering(undecided) as (endpoint, asked):
        with pytest.raises(StoreError) as caught:
            open_tier(endpoint=endpoint).put("x", b"1", create_only=True)
        assert caught.value.retryable
        assert [line.partition(" ")[0] for line in asked] == ["PUT", "HEAD"]
    with answering(undecided, HEAD=there) as (endpoint, _):
        with pytest.raises(FencedError):
            open_tier(endpoint=endpoint).put("x", b"1", create_only=True)
        with pytest.raises(StoreError):
            open_tier(endpoint=endpoint).put("x", b"1")


def test_a_server_that_ignores_conditions_is_refused(open_tier: Callable[..., Tier]) -> None:
    """A server that overwrites what must be left alone is found out before a job relies on it."""
    with answering(b'HTTP/1.1 200 OK\r\nETag: "x"\r\nContent-Length: 0\r\n\r\n') as (endpoint, _):
        with pytest.raises(RefusedError, match="create-only") as caught:
            open_tier(endpoint=endpoint).check_writable()
    assert "If-None-Match" in str(caught.value.hint)


def test_a_server_that_ignores_ranges_is_an_error(open_tier: Callable[..., Tier]) -> None:
    """Bytes from somewhere else are never taken for those of the range."""
    with answering(b'HTTP/1.1 200 OK\r\nETag: "x"\r\nContent-Length: 4\r\n\r\n1234') as (endpoint, _):
        with pytest.raises(StoreError, match="ranges"):
            open_tier(endpoint=endpoint).read_into("x", 2, memoryview(bytearray(2)))


def test_an_answer_that_breaks_off(open_tier: Callable[..., Tier]) -> None:
    """A connection that ends in the middle of an object is an error that may pass, not a short object."""
    with answering(b'HTTP/1.1 200 OK\r\nConnection: close\r\nETag: "x"\r\nContent-Length: 9\r\n\r\n1234') as (
        endpoint,
        _,
    ):
        tier = open_tier(endpoint=endpoint, timeout=1)
        with pytest.raises(StoreError) as caught:
            tier.get("x")
    assert caught.value.retryable
    assert "s3://" in caught.value.message
