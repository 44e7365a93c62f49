"""Adoption: another job's checkpoint becomes the first of a job, checked byte by byte, and its own job sees nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckptd.errors import CkptdError, DamagedError, FencedError, FullError, NotFoundError, StoreError
from ckptd.storage import catalog, keys
from ckptd.storage.adopting import adopt, make_way
from ckptd.storage.local import LocalTier
from ckptd.storage.memory import MemoryTier
from ckptd.storage.tier import Data, Pace, Tier
from ckptd.types import CheckpointId
from tests.storage.checkpoints import DAMAGE, FILE, FIRST, JOB, KEY, LATER, Bucket, commit, fill, flip, good, needed

NEW = "tuned"


class ReadOnly(Bucket):
    """A bucket that nobody may change."""

    sealed = False

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        assert not self.sealed, f"{key} was put"
        super().put(key, data, create_only=create_only, pace=pace)

    def delete(self, key: str) -> None:
        raise AssertionError(f"{key} was deleted")


@pytest.fixture
def source() -> ReadOnly:
    """The place of a job with two checkpoints, which is only read."""
    bucket = ReadOnly()
    fill(bucket)
    bucket.sealed = True
    return bucket


def document(tier: Tier, job: str, checkpoint: CheckpointId) -> dict[str, Any]:
    """A manifest as JSON."""
    return json.loads(tier.get(keys.manifest_key(job, checkpoint)))


def record(tier: Tier, generation: int) -> dict[str, Any]:
    """The record of a generation of the new job."""
    return json.loads(tier.get(keys.generation_key(NEW, generation)))


@pytest.mark.parametrize("checkpoint", [FIRST, LATER])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_checkpoint_changes_its_job_and_nothing_else(source: ReadOnly, tmp_path: Path, on_disk, checkpoint) -> None:
    """Every file comes under its own name, also one of an older checkpoint; the manifest differs in whose it is."""
    target = LocalTier(tmp_path) if on_disk else MemoryTier()
    told: list[int] = []
    adopted = adopt(source, JOB, target, NEW, checkpoint, progress=told.append)
    assert {f"{JOB}/{file}" for file in adopted.files} == needed(checkpoint) == source.read
    assert adopted.size_bytes == sum(told) == sum(len(good()[key]) for key in needed(checkpoint))
    assert catalog.verify(target, NEW, checkpoint) == []
    for file in adopted.files:
        assert target.get(f"{NEW}/{file}") == good()[f"{JOB}/{file}"]
    before, after = document(source, JOB, checkpoint), document(target, NEW, checkpoint)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"job", "document_digest"} | ({"parent"} if checkpoint == LATER else set())
    assert (after["job"], after["parent"]) == (NEW, None)
    assert list(before) == list(after)
    assert catalog.holdings(target, NEW) == catalog.Holdings({1: None}, (checkpoint,))
    assert record(target, 1)["resumed_from"] == {"url": source.url, "job": JOB, **checkpoint._asdict()}


def test_the_same_name_is_no_special_case(source: ReadOnly, target: LocalTier) -> None:
    """A job may resume from one of its own name elsewhere."""
    adopt(source, JOB, target, JOB, LATER)
    assert catalog.verify(target, JOB, LATER) == []
    assert catalog.holdings(target, JOB).parents == {1: None}


def test_two_jobs_of_one_place(tmp_path: Path) -> None:
    """A job may resume from its neighbour: no key of that one changes."""
    tier = LocalTier(tmp_path)
    fill(tier)
    before = sorted((entry.key, entry.modified_at) for entry in tier.list(f"{JOB}/"))
    adopt(tier, JOB, tier, NEW, LATER)
    assert catalog.verify(tier, NEW, LATER) == []
    assert sorted((entry.key, entry.modified_at) for entry in tier.list(f"{JOB}/")) == before


@pytest.mark.parametrize(("last", "claims", "parent"), [(0, 1, None), (1, 2, FIRST), (7, 8, FIRST)])
def test_generations_that_came_to_nothing(source: ReadOnly, target: LocalTier, last: int, claims: int, parent) -> None:
    """What a job has claimed before stays; the newest generation then is one whose lineage has the checkpoint."""
    for number in range(1, last + 1):
        catalog.claim_generation(target, NEW, number, None, 1.0)
    adopt(source, JOB, target, NEW, FIRST, last_generation=last)
    held = catalog.holdings(target, NEW)
    assert max(held.parents) == claims
    assert held.parents[claims] == parent
    assert record(target, claims)["resumed_from"]["step"] == FIRST.step


@pytest.mark.parametrize("damage", sorted(DAMAGE))
@pytest.mark.parametrize("checkpoint", [FIRST, LATER])
def test_damage_there_is_never_committed_here(target: LocalTier, damage: str, checkpoint) -> None:
    """Whatever is wrong with a file there, it is named and neither the file nor a manifest appears here."""
    bucket = Bucket()
    fill(bucket)
    DAMAGE[damage](bucket, KEY)
    if checkpoint == LATER and catalog.verify(bucket, JOB, LATER) == []:
        adopt(bucket, JOB, target, NEW, LATER)  # what is damaged there is nothing that it needs
        assert catalog.verify(target, NEW, LATER) == []
        return
    with pytest.raises((DamagedError, NotFoundError)) as caught:
        adopt(bucket, JOB, target, NEW, checkpoint)
    assert FILE in caught.value.message
    left = {entry.key for entry in target.list("")}
    assert f"{NEW}/{FILE}" not in left
    assert not any(key.endswith(".json") for key in left)


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_it_goes_on_where_it_was(source: ReadOnly, target: LocalTier, damage: str) -> None:
    """Of files that lie here already the intact ones stay, and one that is damaged comes anew."""
    for key in needed(FIRST):
        target.put(key.replace(JOB, NEW, 1), good()[key])
    DAMAGE[damage](target, f"{NEW}/{FILE}")
    assert adopt(source, JOB, target, NEW, FIRST).files == (FILE,)
    assert source.read == {KEY}
    assert catalog.verify(target, NEW, FIRST) == []


class _Dying(LocalTier):
    """A tier whose put fails at the end of so many."""

    left = 0

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        if not self.left:
            raise FullError("the disk is full")
        self.left -= 1
        super().put(key, data, create_only=create_only, pace=pace)


@pytest.mark.parametrize("puts", range(5))
def test_interrupted_anywhere(source: ReadOnly, tmp_path: Path, puts: int) -> None:
    """Whichever put is the last, the job has no checkpoint, or all of it, and the next attempt ends well."""
    target = _Dying(tmp_path)
    target.left = puts
    with pytest.raises(FullError):
        adopt(source, JOB, target, NEW, LATER, threads=1)
    held = catalog.holdings(target, NEW)
    assert held.committed == ()
    target.left = 9
    adopt(source, JOB, target, NEW, LATER, last_generation=max(held.parents, default=0), threads=1)
    held = catalog.holdings(target, NEW)
    assert held.committed == (LATER,)
    assert held.parents[max(held.parents)] in (None, LATER)
    assert catalog.verify(target, NEW, LATER) == []


def test_a_generation_of_somebody_else(source: ReadOnly, target: LocalTier) -> None:
    """When another agent takes the generation first, nothing is committed under its number."""
    catalog.claim_generation(target, NEW, 1, None, 1.0)
    with pytest.raises(FencedError):
        adopt(source, JOB, target, NEW, FIRST)
    assert catalog.holdings(target, NEW).committed == ()


def test_what_is_not_there(target: LocalTier) -> None:
    """A checkpoint that the source does not have is not found, and neither is one without all of its files."""
    with pytest.raises(NotFoundError):
        adopt(Bucket(), JOB, target, NEW, FIRST)
    with pytest.raises(NotFoundError, match="rank-00001"):
        adopt(fill(Bucket(), only=lambda key: key != KEY), JOB, target, NEW, FIRST)


def test_a_pace_that_ends_it(source: ReadOnly, target: LocalTier) -> None:
    """An error of the pace ends it before its next piece, and nothing is committed."""

    def pace(size_bytes: int) -> None:
        raise CkptdError(f"no more than {size_bytes}")

    with pytest.raises(CkptdError, match="no more than"):
        adopt(source, JOB, target, NEW, FIRST, pace=pace)
    assert [entry.key for entry in target.list("")] == []


def test_make_way(source: ReadOnly, target: LocalTier) -> None:
    """Files of a needed name with other contents go, files that are what is needed and all others stay."""
    loaded = catalog.load_manifest(source, JOB, LATER)
    right, wrong = sorted(loaded.files)[:2]
    target.put(f"{NEW}/{right}", good()[f"{JOB}/{right}"])
    target.put(f"{NEW}/{wrong}", good()[f"{JOB}/{wrong}"])
    flip(target, f"{NEW}/{wrong}", 5000)
    other = keys.shard_key(NEW, CheckpointId(3, 5), 0)
    target.put(other, b"of a run that was killed")
    assert make_way(target, NEW, loaded) == (wrong,)
    assert {entry.key for entry in target.list("")} == {f"{NEW}/{right}", other}
    assert make_way(target, NEW, loaded) == ()


class _Unreadable(MemoryTier):
    """A tier that lists and does not give."""

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        raise StoreError(f"no answer for {key}")


def test_make_way_removes_nothing_that_it_can_not_read(source: ReadOnly) -> None:
    """A file that can't be looked at may be another agent's good one, and stays."""
    loaded = catalog.load_manifest(source, JOB, FIRST)
    tier = _Unreadable()
    tier.put(f"{NEW}/{FILE}", good()[KEY])
    with pytest.raises(StoreError):
        make_way(tier, NEW, loaded)
    assert list(tier.objects) == [f"{NEW}/{FILE}"]


def test_a_manifest_of_another_world(target: LocalTier) -> None:
    """A manifest that is not that of the job and step it stands for is damage, not somebody's checkpoint."""
    bucket = MemoryTier()
    commit(bucket)
    bucket.put(keys.manifest_key(JOB, LATER), bucket.get(keys.manifest_key(JOB, FIRST)))
    with pytest.raises(DamagedError, match="is that of gpt"):
        adopt(bucket, JOB, target, NEW, LATER)
