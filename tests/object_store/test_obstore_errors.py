"""How the tier over obstore fails: what a server, a network or a user may do, and the error that it becomes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from obstore.exceptions import GenericError

from ckptd.errors import ConfigError, DamagedError, FencedError, RefusedError, StoreError
from ckptd_plugins.storage_obstore import open_obstore, settings
from ckptd_plugins.storage_obstore.failures import translated
from ckptd_plugins.storage_obstore.tier import ObstoreTier
from ckptd_plugins.storage_s3.options import Place, S3Options
from tests.object_store import server as s3
from tests.object_store.obstore_tier import MIB, PART, Drawn, opened


@pytest.fixture
def tier(place: Place) -> Iterator[ObstoreTier]:
    """A tier with the smallest parts that S3 takes, so that little data makes many."""
    tier = opened(place, part_bytes=PART, timeout=20)
    yield tier
    tier.close()


def test_wrong_credentials_are_refused_and_not_shown(
    place: Place, monkeypatch: pytest.MonkeyPatch, s3_server: s3.Server
) -> None:
    """A wrong secret is an error that no retry cures, whose text and chain of causes hold no credential of ours."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-secret")
    tier = opened(place)
    for call in (
        lambda: tier.put("a", b"1"),
        lambda: tier.put("a", Drawn(40 * MIB)),
        lambda: tier.get("a"),
        lambda: list(tier.list("a/")),
        lambda: tier.delete("a"),
        lambda: tier.sweep("", 0),
        tier.check_writable,
    ):
        with pytest.raises(RefusedError) as caught:
            call()
        for shown in (str(caught.value), repr(caught.value), repr(tier), str(caught.value.__cause__)):
            assert "wrong-and-secret" not in shown
            assert s3.ACCESS_KEY not in shown.replace(s3_server.endpoint, "")


def test_no_credentials_are_refused_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any credentials the error says so and what to do, and asks nobody on the network for minutes."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    begin_s = time.monotonic()
    with pytest.raises(RefusedError, match=r"no AWS credentials.*AWS_ACCESS_KEY_ID"):
        opened(place).get("a")
    assert time.monotonic() - begin_s < 10


def test_a_profile_is_used(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials, endpoint and region of a profile in the user's files are found, though the engine reads none."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    config = tmp_path / "config"
    config.write_text(
        f"[profile lab]\nendpoint_url = {endpoint}\nregion = {s3.REGION}\n"
        f"aws_access_key_id = {s3.ACCESS_KEY}\naws_secret_access_key = {s3.SECRET_KEY}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    tier = opened(place, profile="lab")
    tier.put("a", b"by profile")
    assert tier.get("a") == b"by profile"


def test_a_bucket_that_is_missing_is_refused(s3_server: s3.Server) -> None:
    """A job does not start on a bucket that isn't there, and the error names it."""
    with pytest.raises(RefusedError, match=r"NoSuchBucket.*create the bucket"):
        opened("s3://no-such-bucket-anywhere").check_writable()


def test_a_hung_server_is_an_error_in_time(place: Place, s3_server: s3.Server) -> None:
    """A server that has stopped answering is a retryable error within the time a request may stand still."""
    tier = opened(place, timeout=1)
    tier.put("a", b"1")
    s3_server.stand_still()
    try:
        for call in (lambda: tier.put("a", b"2"), lambda: tier.get("a"), lambda: list(tier.list(""))):
            begin_s = time.monotonic()
            with pytest.raises(StoreError, match="no answer in time") as caught:
                call()
            assert caught.value.retryable
            assert time.monotonic() - begin_s < 8
    finally:
        s3_server.go_on()
    tier.put("b", b"3")  # another key: what timed out may still arrive
    assert tier.get("b") == b"3"


def test_nobody_there_is_a_retryable_error(place: Place) -> None:
    """A refused connection is transient, and named as what it is."""
    tier = opened(place, endpoint="http://127.0.0.1:1")
    with pytest.raises(StoreError, match=f"{place.url}/a: can't connect") as caught:
        tier.get("a")
    assert caught.value.retryable


def test_an_object_that_changes_beside_a_read_is_never_mixed(tier: ObstoreTier) -> None:
    """A large read gives one object's bytes or an error, when another takes its place meanwhile."""
    versions = [bytes([number]) * (4 * PART) for number in range(2)]
    tier.put("torn", versions[0])
    over = threading.Event()

    def replace() -> None:
        while not over.is_set():
            for version in versions:
                tier.put("torn", version)

    writer = threading.Thread(target=replace)
    writer.start()
    into = memoryview(bytearray(4 * PART))
    try:
        for _ in range(10):
            try:
                tier.read_into("torn", 0, into)
            except (StoreError, DamagedError):
                continue
            assert into in versions
    finally:
        over.set()
        writer.join()


@pytest.mark.parametrize("key", ["a/../b", "a//b", "./a"])
def test_a_key_that_can_not_be_is_refused(tier: ObstoreTier, key: str) -> None:
    """A key with an empty part or dots is refused, instead of being another key."""
    with pytest.raises(RefusedError):
        tier.put(key, b"1")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("status code: 503 Service Unavailable: <Code>SlowDown</Code>", StoreError),
        ("status code: 500 Internal Server Error: <Code>InternalError</Code>", StoreError),
        ("status code: 400 Bad Request: <Code>ExpiredToken</Code>", RefusedError),
        ("status code: 301 Moved Permanently: <Code>PermanentRedirect</Code>", RefusedError),
        ("status code: 409 Conflict: <Code>ConditionalRequestConflict</Code>", FencedError),
        ("status code: 404 Not Found: <Code>NoSuchUpload</Code>", StoreError),
        ("status code: 400 Bad Request: ", RefusedError),
        ("HTTP error: kind: Interrupted", StoreError),
        ("status code: 416 Range Not Satisfiable: ", DamagedError),
        ("HTTP error: error sending request kind: Timeout", StoreError),
    ],
)
def test_answers_become_errors(text: str, kind: type[Exception]) -> None:
    """What a server answers decides whether a retry is worth it; secrets in the answer stay out of the error."""
    error = translated("put", "s3://b/k", GenericError(f"{text}<StringToSign>hush</StringToSign>"), None)
    assert type(error) is kind
    assert "hush" not in str(error)


@pytest.mark.parametrize(
    ("given", "endpoint", "wanted"),
    [
        ({}, None, {"unsigned_payload": True, "virtual_hosted_style_request": True, "region": "r"}),
        (
            {},
            "http://h:1",
            {"unsigned_payload": False, "virtual_hosted_style_request": False, "endpoint": "http://h:1"},
        ),
        ({}, "https://h", {"unsigned_payload": True, "endpoint": "https://h"}),
        ({"addressing": "virtual"}, "https://h:1", {"endpoint": "https://b.h:1", "virtual_hosted_style_request": True}),
        ({"addressing": "path"}, None, {"virtual_hosted_style_request": False}),
        ({"sse": "aws:kms", "sse_kms_key": "k"}, None, {"server_side_encryption": "aws:kms", "sse_kms_key_id": "k"}),
        ({"requester_pays": True, "anon": True}, None, {"request_payer": True, "skip_signature": True}),
    ],
)
def test_options_become_settings(given: dict[str, object], endpoint: str | None, wanted: dict[str, object]) -> None:
    """Each option reaches the engine under its name there; http is allowed only where the endpoint says it."""
    options = S3Options.of(given)
    found = settings.store(options, "b", endpoint, "r")
    assert {name: found.get(name) for name in wanted} == wanted
    assert settings.client(options, endpoint)["allow_http"] is (endpoint == "http://h:1")


def test_bad_places_are_refused() -> None:
    """A URL with credentials in it, and one without a bucket, can't be opened."""
    for url in ("s3://id:secret@bucket/x", "s3:///x"):
        with pytest.raises(ConfigError) as caught:
            open_obstore(url)
        assert "secret" not in str(caught.value)
