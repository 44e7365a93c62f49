"""Whole checkpoints through a proxy with faults: what is committed in the bucket, and what a fetch gives, is right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ckptd.errors import CkptdError, DamagedError, FencedError, RefusedError, StoreError
from ckptd.storage import catalog, copying, fetching, keys
from ckptd.storage.memory import MemoryTier
from ckptd.storage.tier import Tier
from tests.object_store.faults import Answer, Fault, Flip, LoseAnswer, Reset, Stall, Swallow, Truncate
from tests.object_store.proxied import Bucket, chosen
from tests.storage.checkpoints import FIRST, JOB, LATER, fill, flip, good, is_right, needed

_LONG = {"a stall in a file", "a file that breaks off", "a manifest that breaks off", "changed bytes for good", "503s"}
MANIFEST = keys.manifest_key(JOB, LATER)


@pytest.fixture
def local() -> Tier:
    """The tier that a job commits to first, with two checkpoints, of which the later one refers to the earlier."""
    return fill(MemoryTier())


def commits(bucket: Bucket) -> bool:
    """Whether the later checkpoint is committed in the bucket; if it is, every byte of it has to be right."""
    if bucket.kept(MANIFEST) is None:
        return False
    behind = MemoryTier()
    for key in {*needed(LATER), MANIFEST}:
        found = bucket.kept(key)
        assert found is not None, f"committed without {key}"
        behind.put(key, found)
    assert catalog.verify(behind, JOB, LATER) == []
    assert bucket.kept(MANIFEST) == good()[MANIFEST]
    return True


UPLOADS: dict[str, tuple[Fault, str, int, type[CkptdError] | None]] = {
    "503s": (Answer(503, "SlowDown"), "", 4, None),
    "a reset in a file": (Reset(2**20), "rank-00001", 1, None),
    "a changed byte in a file": (Flip(2**20), "rank-00001", 1, None),
    "a changed byte in the manifest": (Flip(100), "manifest", 1, None),
    "a commit nobody heard of": (LoseAnswer(), "manifest", 1, None),
    "a commit reset before it arrived": (Reset(10), "manifest", 1, None),
    "a file that was not kept": (Swallow(), "rank-00000", 9, StoreError),
    "a manifest that was not kept": (Swallow(), "manifest", 9, StoreError),
    "an expired token": (Answer(403, "ExpiredToken"), "", 9, RefusedError),
    "a bucket that is gone": (Answer(404, "NoSuchBucket"), "manifest", 9, RefusedError),
    "changed bytes for good": (Flip(2**20), "rank-00001", 99, StoreError),
}


@pytest.mark.parametrize("case", chosen(UPLOADS, _LONG))
def test_an_upload_commits_what_is_right_or_nothing(bucket: Bucket, local: Tier, case: str) -> None:
    """An upload passes or says what is wrong, commits nothing that is not whole, and passes once the fault is over."""
    fault, key, times, kind = UPLOADS[case]
    target = bucket.agents(deadline_s=60 if kind is None else 0.5)
    rule = bucket.proxy.add(fault, "put", key=key, times=times)
    if kind is None:
        copying.upload(local, target, JOB, LATER)
        assert commits(bucket)
    else:
        with pytest.raises(kind):
            copying.upload(local, target, JOB, LATER)
        assert not commits(bucket)
    assert rule.hits >= 1, "the fault was not met"
    rule.end()
    copying.upload(local, target, JOB, LATER)
    assert commits(bucket)


def test_a_commit_of_somebody_else_is_not_ours(bucket: Bucket, local: Tier) -> None:
    """When the answer to a commit was lost and another manifest stands there, the upload is fenced."""
    bucket.client.put_object(Bucket=bucket.place.bucket, Key=bucket.place.prefix + MANIFEST, Body=b"{}")
    bucket.proxy.add(Reset(10), "put", key="manifest", times=1)
    with pytest.raises(FencedError):
        copying.upload(local, bucket.agents(), JOB, LATER)
    assert bucket.kept(MANIFEST) == b"{}"


@pytest.fixture
def uploaded(bucket: Bucket, local: Tier) -> Iterator[Bucket]:
    """A bucket that has both checkpoints."""
    plain = bucket.tier()
    for checkpoint in (FIRST, LATER):
        copying.upload(local, plain, JOB, checkpoint)
    bucket.proxy.clear()
    yield bucket


FETCHES: dict[str, tuple[Fault, str, int]] = {
    "503s": (Answer(503, "SlowDown"), "", 4),
    "a reset in a file": (Reset(2**20, answer=True), "rank-00001", 1),
    "a file that breaks off": (Truncate(2**20), "rank-00001", 1),
    "a stall in a file": (Stall(after_bytes=2**20, answer=True), "rank-00001", 1),
    "a changed byte in a file": (Flip(2**20, answer=True), "rank-00001", 1),
    "a changed header": (Flip(30, answer=True), "rank-00000", 1),
    "a changed manifest": (Flip(200, answer=True), "manifest", 1),
    "a manifest that breaks off": (Truncate(200), "manifest", 1),
}


@pytest.mark.parametrize("case", chosen(FETCHES, _LONG))
def test_a_fetch_gives_what_was_committed_or_nothing(uploaded: Bucket, case: str) -> None:
    """A fetch with a fault on its way ends in what was committed, at the second time where bytes were changed."""
    fault, key, times = FETCHES[case]
    rule = uploaded.proxy.add(fault, "get", key=key, times=times)
    target = MemoryTier()
    try:
        fetching.fetch([uploaded.agents(deadline_s=60, timeout=5)], target, JOB, LATER)
    except DamagedError:
        assert isinstance(fault, Flip), "an honest fault passed for damage"
        assert MANIFEST not in target.objects
        fetching.fetch([uploaded.agents()], target, JOB, LATER)
    assert rule.hits == times
    assert is_right(target, LATER)


@pytest.mark.faults
def test_a_source_that_hangs_gives_way_to_another(uploaded: Bucket, local: Tier) -> None:
    """A fetch does not wait for a bucket that answers nothing when another tier has a good copy."""
    uploaded.proxy.add(Stall())
    target = MemoryTier()
    said: list[str] = []
    fetching.fetch(
        [uploaded.agents(), local], target, JOB, LATER, stall_s=4, report=lambda event, _: said.append(event)
    )
    assert is_right(target, LATER)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_repair_over_a_bad_way(uploaded: Bucket, local: Tier, damaged: bool) -> None:
    """A damaged object in the bucket is replaced by the good copy through resets and 503s; what is intact stays."""
    key = keys.shard_key(JOB, LATER, 0)
    plain = uploaded.tier()
    if damaged:
        flip(plain, key, 2 * 2**10)
    uploaded.proxy.add(Reset(1000), "put", times=1)
    uploaded.proxy.add(Answer(503, "SlowDown"), "get", "put", times=2)
    found = fetching.repair(uploaded.agents(deadline_s=60), [local], JOB, LATER)
    assert [item.error for item in found] == [None] * damaged
    assert uploaded.kept(key) == good()[key]
