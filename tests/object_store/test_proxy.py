"""Single calls of a tier through a proxy with faults: success within the deadline or the right error, never a lie."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path

import pytest

from ckptd.errors import CkptdError, DamagedError, FencedError, RefusedError, StoreError
from ckptd.storage.wrappers import RetryingTier, RetryPolicy
from tests.object_store import server as s3
from tests.object_store.faults import Answer, Drip, Fault, Flip, LoseAnswer, Reset, Stall, Swallow, Truncate
from tests.object_store.proxied import PART, Bucket, chosen

SMALL = b"a small object " * 10
LARGE = os.urandom(256) * (PART // 256) + os.urandom(256) * (PART // 256) + b"the end"
"""Three parts, of which no two are alike."""
_BOUND_S = 40.0
"""What no call of these tests takes, far beyond what it should on a machine that is busy."""


_LONG = {
    *("changed bytes", "resets", "no answers", "a stall in the middle", "a short stall", "502 of a balancer"),
    *("an unknown key", "no permission", "a reset instead of an answer", "500 for a beginning", "500 for an end"),
    *("a lost answer to a part", "no bucket", "a wrong clock"),
}
"""Cases of the campaign: they take long, or differ little from one that is always run."""
PASSING: dict[str, tuple[Fault, tuple[str, ...], int]] = {
    "503 for a whole object": (Answer(503, "SlowDown"), ("put",), 3),
    "503 for parts": (Answer(503, "SlowDown"), ("part",), 3),
    "500 for a beginning": (Answer(500, "InternalError"), ("begin",), 2),
    "500 for an end": (Answer(500, "InternalError"), ("complete",), 1),
    "an error in an answer that began well": (Answer(200, "InternalError"), ("complete",), 1),
    "502 of a balancer": (Answer(502, "BadGateway"), ("part", "put"), 2),
    "a reset in a part": (Reset(PART // 2), ("part",), 2),
    "a reset in a whole object": (Reset(10), ("put",), 2),
    "a reset instead of an answer": (Reset(0, answer=True), ("part", "put"), 1),
    "a lost answer to a part": (LoseAnswer(), ("part",), 1),
    "a lost answer to a whole object": (LoseAnswer(), ("put",), 1),
    "a lost answer to an end": (LoseAnswer(), ("complete",), 1),
    "a changed byte in a part": (Flip(PART // 2), ("part",), 1),
    "a changed byte in a whole object": (Flip(10), ("put",), 1),
    "a part that was not kept": (Swallow(), ("part",), 1),
    "an upload that somebody has ended": (Answer(404, "NoSuchUpload"), ("part",), 1),
    "a short stall": (Stall(1.0, after_bytes=100), ("part", "put"), 1),
}


@pytest.mark.parametrize("case", chosen(PASSING, _LONG))
def test_what_passes_is_waited_out(bucket: Bucket, case: str) -> None:
    """A fault that passes ends in the object that was put, small or large, byte for byte, and no upload stays open."""
    fault, kinds, times = PASSING[case]
    tier = bucket.agents(deadline_s=20)
    for key, data, kind in (("small", SMALL, "put"), ("large", LARGE, "part")):
        if kind not in kinds and not (key == "large" and {"begin", "complete"} & set(kinds)):
            continue
        rule = bucket.proxy.add(fault, *kinds, times=times)
        tier.put(key, data)
        assert rule.hits == times, "the fault was not met"
        assert bucket.kept(key) == data
        rule.end()
    assert bucket.open_uploads() == []


LASTING: dict[str, tuple[Fault, type[CkptdError], str]] = {
    "503": (Answer(503, "SlowDown"), StoreError, "SlowDown"),
    "changed bytes": (Flip(100), StoreError, "BadDigest"),
    "resets": (Reset(50), StoreError, "connection broke off|can't be reached|Interrupted|connection failed"),
    "no answers": (Stall(), StoreError, "in time"),
    "a stall in the middle": (Stall(after_bytes=100), StoreError, "in time"),
    "an expired token": (Answer(400, "ExpiredToken"), RefusedError, "ExpiredToken.*(renew|new credentials)"),
    "an unknown key": (Answer(403, "InvalidAccessKeyId"), RefusedError, "InvalidAccessKeyId.*credentials"),
    "a wrong clock": (Answer(403, "RequestTimeTooSkewed"), RefusedError, "RequestTimeTooSkewed.*clock"),
    "no bucket": (Answer(404, "NoSuchBucket"), RefusedError, "NoSuchBucket.*bucket"),
    "no permission": (Answer(403, "AccessDenied"), RefusedError, "AccessDenied"),
}


@pytest.mark.parametrize("case", chosen(LASTING, _LONG))
def test_what_lasts_is_an_error_in_time(bucket: Bucket, case: str) -> None:
    """A fault that stays is the right error within a bound, and leaves neither an object nor, once swept, an upload.

    What is put afterwards arrives: nothing of a failure sticks to the tier.
    """
    fault, kind, words = LASTING[case]
    tier = bucket.agents(deadline_s=0.5, timeout=2 if isinstance(fault, Stall) else 5)
    for key, data, kinds in (("small", SMALL, ("put",)), ("large", LARGE, ("part",))):
        rule = bucket.proxy.add(fault, *kinds)
        begun_s = time.monotonic()
        with pytest.raises(kind, match=words) as caught:
            tier.put(key, data)
        assert time.monotonic() - begun_s < _BOUND_S
        assert caught.value.retryable is (kind is StoreError)
        assert f"{tier.url}/{key}" in caught.value.message
        rule.end()
        assert bucket.kept(key) is None
        tier.sweep("", -60)
        assert bucket.open_uploads() == []
        tier.put(key, data)
        assert bucket.kept(key) == data


@pytest.mark.faults
def test_a_server_that_hangs_is_given_up(bucket: Bucket) -> None:
    """While nothing is answered each call fails by itself, as something that passes; a large put takes no more than two
    of the times that a request may stand still."""
    bucket.tier().put("a", LARGE)
    tier = bucket.tier(timeout=2)
    hung = bucket.proxy.add(Stall())
    for call in (
        lambda: tier.put("b", SMALL),
        lambda: tier.put("b", LARGE),
        lambda: tier.put("b", SMALL, create_only=True),
        lambda: tier.get("a"),
        lambda: tier.size_bytes("a"),
        lambda: tier.read_into("a", 0, memoryview(bytearray(len(LARGE)))),
        lambda: list(tier.list("")),
        lambda: tier.delete("a"),
        lambda: tier.sweep("", 0.0),
    ):
        bucket.proxy.requests.clear()
        with pytest.raises(StoreError, match=r"in time|Timeout") as caught:
            call()
        assert caught.value.retryable
        assert sum(bucket.proxy.counts().values()) <= 3, "the client tried again by itself"
    hung.end()
    bucket.proxy.clear()
    late = bucket.proxy.add(Stall(), "part", "abort", "complete")
    bucket.proxy.requests.clear()
    with pytest.raises(StoreError, match="in time"):
        tier.put("c", LARGE)
    assert bucket.proxy.counts()["part"] <= 2, "a part that ran out of time was sent again"
    assert bucket.proxy.counts()["abort"] <= 1
    late.end()


@pytest.mark.faults
def test_a_slow_server_is_not_a_hung_one(bucket: Bucket) -> None:
    """What moves arrives, however much longer it takes than a request may stand still: an upload and a download."""
    size_bytes = 24 * 2**20
    data = os.urandom(2**20) * 24
    tier = bucket.tier(part_bytes=12 * 2**20, timeout=3)
    slow = bucket.proxy.add(Drip(3 * 2**20), "part")
    tier.put("slow", data)
    slow.end()
    assert bucket.kept("slow") == data
    bucket.proxy.add(Drip(2 * 2**20, answer=True), "get")
    into = memoryview(bytearray(size_bytes // 2))
    tier.read_into("slow", 0, into)
    assert into == data[: size_bytes // 2]


def test_a_server_that_takes_no_more_bytes_is_given_up(bucket: Bucket) -> None:
    """A part that is larger than what the kernel holds, and stands still half-way, fails in time and says so."""
    tier = bucket.tier(part_bytes=24 * 2**20, timeout=1, connect_timeout=1)
    bucket.proxy.add(Stall(after_bytes=100), "part")
    with pytest.raises(StoreError, match="in time") as caught:
        tier.put("stuck", os.urandom(2**20) * 25)
    assert caught.value.retryable


def test_nobody_in_between_can_change_what_is_sent(bucket: Bucket) -> None:
    """Whatever its size, a signature covers the bytes of an object or part, or the SHA-256 they are compared with."""
    tier = bucket.tier()
    for key, data in (("small", SMALL), ("middle", LARGE[: 2 * 2**20]), ("large", LARGE)):
        tier.put(key, data)
    sent = [request for request in bucket.proxy.requests if request.kind in ("put", "part")]
    assert len(sent) == 5
    for request in sent:
        assert request.covered & {"body", "x-amz-checksum-sha256"}, f"{request} can be forged"


def test_a_lost_answer_to_a_claim(bucket: Bucket) -> None:
    """A create-only put whose answer was lost knows its own object, and takes nobody else's for it."""
    tier = RetryingTier(bucket.tier(), RetryPolicy(deadline_s=5))
    lost = bucket.proxy.add(LoseAnswer(), "put", times=1)
    tier.put("ours", SMALL, create_only=True)
    assert lost.hits == 1
    assert bucket.kept("ours") == SMALL
    lost.end()
    where = {"Bucket": bucket.place.bucket, "Key": f"{bucket.place.prefix}theirs"}
    bucket.client.put_object(**where, Body=b"somebody else")
    bucket.proxy.add(Reset(0), "put", times=1)
    with pytest.raises(FencedError):
        tier.put("theirs", SMALL, create_only=True)
    assert bucket.kept("theirs") == b"somebody else"


def test_a_put_that_was_not_kept_is_an_error(bucket: Bucket) -> None:
    """When success is answered and nothing kept, whole or in parts, the put is an error that says so; so is a claim,
    and what somebody else has put in its place meanwhile is left alone."""
    tier = bucket.agents(deadline_s=1)
    lie = bucket.proxy.add(Swallow(), "put", "complete")
    for key, data in (("small", SMALL), ("large", LARGE)):
        with pytest.raises(StoreError, match="was put and is not there") as caught:
            tier.put(key, data)
        assert caught.value.retryable
    where = {"Bucket": bucket.place.bucket, "Key": f"{bucket.place.prefix}claim"}
    bucket.client.put_object(**where, Body=b"somebody else")
    with pytest.raises(StoreError, match="claim was put and has"):
        tier.put("claim", SMALL, create_only=True)
    assert bucket.kept("claim") == b"somebody else"
    lie.end()
    with pytest.raises(FencedError):
        tier.put("claim", SMALL, create_only=True)
    tier.sweep("", -60)
    assert bucket.open_uploads() == []


def test_reads_are_whole_or_an_error(bucket: Bucket) -> None:
    """An answer that is cut, reset or changed is never taken for the object, and a second try has it."""
    writer, tier = bucket.tier(), bucket.agents(timeout=3)
    writer.put("small", SMALL)
    writer.put("large", LARGE)
    for fault in (Truncate(20), Reset(20, answer=True), Flip(20, answer=True), Answer(503, "SlowDown")):
        rules = [bucket.proxy.add(fault, "get", key="small", times=1)]
        with pytest.raises(StoreError) as caught:
            writer.get("small")
        assert caught.value.retryable
        rules.append(bucket.proxy.add(fault, "get", key="small", times=1))
        assert tier.get("small") == SMALL
        assert [rule.hits for rule in rules] == [1, 1]
    for fault in (Truncate(2**20), Reset(2**20, answer=True)):
        into = memoryview(bytearray(len(LARGE)))
        rule = bucket.proxy.add(fault, "get", key="large", times=1)
        tier.read_into("large", 0, into)
        assert rule.hits == 1
        assert into == LARGE
        rule.end()


def test_a_bucket_that_is_gone_is_not_an_empty_one(bucket: Bucket) -> None:
    """Neither listing nor reading passes for an answer that nothing is there; when the bucket is back, so is all."""
    tier = bucket.agents()
    tier.put("a", SMALL)
    gone = bucket.proxy.add(Answer(404, "NoSuchBucket"))
    for call in (lambda: list(tier.list("")), lambda: tier.get("a"), lambda: tier.delete("a"), tier.check_writable):
        with pytest.raises(RefusedError, match="NoSuchBucket"):
            call()
    gone.end()
    assert tier.get("a") == SMALL
    assert [entry.key for entry in tier.list("")] == ["a"]


def test_credentials_that_were_renewed_are_found(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """New credentials in the user's file are used by the call after one that was refused: no restart is needed."""
    keys = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    def write(secret: str) -> None:
        keys.write_text(f"[default]\naws_access_key_id = {s3.ACCESS_KEY}\naws_secret_access_key = {secret}\n")

    write("expired")
    tier = bucket.agents()
    for _ in range(2):
        with pytest.raises(RefusedError):
            tier.put("a", SMALL)
        with pytest.raises(RefusedError):
            tier.size_bytes("a")
    write(s3.SECRET_KEY)
    tier.put("a", SMALL)
    assert tier.get("a") == SMALL


def test_no_error_holds_a_secret(bucket: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever goes wrong, neither secret nor signature is in errors, in their causes or in what libraries log."""
    caplog.set_level("DEBUG", logger="s3fs")
    tier = bucket.agents(deadline_s=0.5)
    said = []
    for fault in (Answer(403, "SignatureDoesNotMatch"), Answer(500, "InternalError"), Reset(0), Truncate(3)):
        rule = bucket.proxy.add(fault)
        for call in (lambda: tier.put("a", SMALL), lambda: tier.put("a", LARGE), lambda: tier.get("a")):
            with pytest.raises((StoreError, DamagedError)) as caught:
                call()
            said.append("".join(traceback.format_exception(caught.value)) + str(caught.value.to_json()))
        rule.end()
    for text in (*said, str(bucket.retries), repr(tier)):
        assert s3.SECRET_KEY not in text
        assert "Signature=" not in text
    ours = "".join(record.getMessage() for record in caplog.records if record.name.startswith(("ckptd", "s3fs")))
    assert s3.SECRET_KEY not in ours
