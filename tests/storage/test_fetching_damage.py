"""Damage anywhere: manifests that differ, repairs, and whatever chance does to three tiers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptd.errors import DamagedError, NotFoundError
from ckptd.storage import catalog, keys, manifest
from ckptd.storage.fetching import Repair, fetch, repair
from ckptd.storage.local import LocalTier
from ckptd.storage.tier import Tier
from tests.storage.checkpoints import (
    DAMAGE,
    FILE,
    FIRST,
    JOB,
    KEY,
    LATER,
    MANIFEST,
    Bucket,
    fill,
    flip,
    good,
    is_right,
    needed,
)

# --- manifests that differ --------------------------------------------------------------------------------------


def changed(edit: Callable[[dict[str, Any]], object]) -> bytes:
    """The manifest with something else in it."""
    document = json.loads(good()[MANIFEST])
    edit(document)
    assert manifest.encode(document) != good()[MANIFEST]
    return manifest.encode(document)


def chunk(document: dict[str, Any], tensor: str) -> dict[str, Any]:
    """What it says of rank 1's part of a tensor."""
    found: dict[str, Any] = document["tensors"][tensor]["chunks"][1]
    return found


_UNUSABLE = {
    "empty": b"",
    "no manifest": b"{}",
    "cut": good()[MANIFEST][:-20],
    "another checkpoint's": good()[keys.manifest_key(JOB, LATER)],
    "an unknown dtype": good()[MANIFEST].replace(b'"F16"', b'"F61"'),
}
_CONTRADICTED = {
    "a tensor's digest": changed(lambda document: chunk(document, "bias").update(digest="0" * 32)),
    "a large tensor's digest": changed(lambda document: chunk(document, "weight").update(digest="0" * 32)),
    "the digest of no bytes": changed(lambda document: chunk(document, "empty").update(digest="0" * 32)),
    "a leaf's digest": changed(lambda document: chunk(document, "weight")["leaves"].reverse()),
    "a shard's digest": changed(lambda document: document["shards"][1].update(digest="0" * 32)),
    "a shard's size": changed(lambda document: document["shards"][1].update(size_bytes=4096)),
    "a dtype": changed(lambda document: document["tensors"]["step"].update(dtype="F64")),
    "a shape": changed(lambda document: chunk(document, "bias").update(shape=[1, 7], offset=[0, 0])),
    "a name": changed(lambda document: document["tensors"].update(step_=document["tensors"].pop("step"))),
    "a tensor left out": changed(lambda document: document["tensors"].pop("step")),
}


@pytest.mark.parametrize("wrong", [*_UNUSABLE, *_CONTRADICTED])
@pytest.mark.parametrize("place", ["target", "bucket"])
def test_a_damaged_manifest_is_replaced(target: LocalTier, wrong: str, place: str) -> None:
    """A manifest that can't be used, or that the files' own headers and digests contradict, is not the one taken."""
    fill(target)
    bucket = fill(Bucket())
    (target if place == "target" else bucket).put(MANIFEST, (_UNUSABLE | _CONTRADICTED)[wrong])
    fetch([bucket], target, JOB, FIRST)
    assert is_right(target, FIRST)


@pytest.mark.parametrize("wrong", sorted(_CONTRADICTED))
def test_a_manifest_that_files_contradict_commits_nothing(target: LocalTier, wrong: str) -> None:
    """When it is the only one there is, the files are damaged as far as anybody knows."""
    bucket = fill(Bucket())
    bucket.put(MANIFEST, _CONTRADICTED[wrong])
    with pytest.raises(DamagedError):
        fetch([bucket], target, JOB, FIRST)
    assert MANIFEST not in {entry.key for entry in target.list("")}
    assert catalog.verify(bucket, JOB, FIRST)


_UNCLEAR = changed(lambda document: document["values"].update(loss=0.5))


def test_most_tiers_are_right_about_a_manifest(target: LocalTier) -> None:
    """What no file tells is taken from where most tiers agree, and with two of them nobody can know."""
    fill(target).put(MANIFEST, _UNCLEAR)
    with pytest.raises(DamagedError, match="tiers have different manifests"):
        fetch([fill(Bucket())], target, JOB, FIRST)
    assert target.get(MANIFEST) == _UNCLEAR
    fetch([fill(Bucket()), fill(Bucket())], target, JOB, FIRST)
    assert is_right(target, FIRST)


# --- repair -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", sorted(DAMAGE))
@pytest.mark.parametrize("far", [False, True])
def test_a_repair_replaces_what_is_damaged(target: LocalTier, damage: str, far: bool) -> None:
    """On a disk as in a bucket, the damaged file is replaced and named with its problem and where the copy was."""
    broken, other = (fill(Bucket()), fill(target)) if far else (fill(target), fill(Bucket()))
    assert repair(broken, [other], JOB, FIRST) == []
    DAMAGE[damage](broken, KEY)
    (problem,) = catalog.verify(broken, JOB, FIRST)[:1]
    (found,) = repair(broken, [other], JOB, FIRST)
    assert (found.file, found.source, found.error) == (FILE, other.name, None)
    assert any(part in problem for part in found.problems)
    assert catalog.verify(broken, JOB, FIRST) == []
    assert repair(broken, [other], JOB, FIRST) == []


def test_a_repair_says_what_it_can_not_do(target: LocalTier) -> None:
    """A file that is good nowhere stays as it is and is named; the others are mended all the same."""
    first = keys.shard_key(JOB, FIRST, 0)
    fill(target)
    bucket = fill(Bucket())
    flip(target, KEY, 40)
    flip(bucket, KEY, 44)
    target.delete(first)
    before = target.get(KEY)
    mended, failed = repair(target, [bucket], JOB, FIRST)
    assert mended == Repair(first.removeprefix(f"{JOB}/"), ("the file is missing",), "bucket", None)
    assert failed.source is None
    assert failed.error and "header" in failed.error
    assert target.get(KEY) == before
    (alone,) = repair(target, [], JOB, FIRST)
    assert alone.error and "no other tier is known" in alone.error


@pytest.mark.parametrize("wrong", sorted(_UNUSABLE | _CONTRADICTED))
def test_a_repair_of_a_manifest(target: LocalTier, wrong: str) -> None:
    """A damaged manifest is replaced like a file, and no file is touched for its sake."""
    fill(target).put(MANIFEST, (_UNUSABLE | _CONTRADICTED)[wrong])
    (found,) = repair(target, [fill(Bucket())], JOB, FIRST)
    assert (found.file, found.source) == (MANIFEST.removeprefix(f"{JOB}/"), "bucket")
    assert is_right(target, FIRST)


def test_a_repair_brings_nothing_that_was_not_there(target: LocalTier) -> None:
    """A checkpoint that is not committed on a tier is not repaired there, whatever lies there of it."""
    fill(target).delete(MANIFEST)
    with pytest.raises(NotFoundError, match="not committed"):
        repair(target, [fill(Bucket())], JOB, FIRST)
    assert MANIFEST not in {entry.key for entry in target.list("")}


# --- any damage -------------------------------------------------------------------------------------------------


def damage_at_random(rng: random.Random, tiers: list[Tier]) -> None:
    """Damage up to six objects anywhere; at least one tier keeps the manifests as they are."""
    spared = rng.choice(tiers)
    for _ in range(rng.randint(1, 6)):
        tier, key = rng.choice(tiers), rng.choice(sorted(good()))
        is_manifest = key.endswith(keys.MANIFEST)
        if (is_manifest and tier is spared) or not any(entry.key == key for entry in tier.list(key)):
            continue
        data = tier.get(key)
        match rng.randrange(7):
            case 0:
                tier.delete(key)
            case 1:
                tier.put(key, data[: rng.randrange(len(data) + 1)])
            case 2:
                tier.put(key, data + rng.randbytes(rng.randint(1, 5000)))
            case 3:
                tier.put(key, good()[rng.choice(sorted(good()))])
            case 4:
                tier.put(key, b"")
            case _:
                for _ in range(rng.randint(1, 3)):
                    if tier.size_bytes(key):
                        flip(tier, key, rng.randrange(tier.size_bytes(key)))


@pytest.mark.parametrize("seed", range(40))
def test_after_any_damage_it_is_right_or_an_error(tmp_path: Path, seed: int) -> None:
    """Whatever is damaged on which tier: what a fetch commits is what was committed, and otherwise it raises."""
    rng = random.Random(seed)
    target, near, bucket = LocalTier(tmp_path / "target"), LocalTier(tmp_path / "near"), Bucket()
    tiers: list[Tier] = [target, near, bucket]
    fill(target, only=lambda key: rng.random() < 0.5)
    fill(near, only=lambda key: rng.random() < 0.8 or key.endswith(keys.MANIFEST))
    fill(bucket)
    damage_at_random(rng, tiers[rng.randint(0, 1) :])
    checkpoint = rng.choice([FIRST, LATER])
    key = keys.manifest_key(JOB, checkpoint)
    whole = all(any(_is_good(tier, each) for tier in tiers) for each in needed(checkpoint))
    try:
        fetch([bucket, near], target, JOB, checkpoint, threads=rng.randint(1, 3))
    except (DamagedError, NotFoundError):
        held = {document for tier in tiers if (document := _get(tier, key)) is not None}
        assert not whole or held != {good()[key]}, "every file was good somewhere, and the manifests were no reason"
    else:
        assert is_right(target, checkpoint)
        assert catalog.verify(target, JOB, checkpoint) == []


def _get(tier: Tier, key: str) -> bytes | None:
    try:
        return tier.get(key)
    except NotFoundError:
        return None


def _is_good(tier: Tier, key: str) -> bool:
    return _get(tier, key) == good()[key]
