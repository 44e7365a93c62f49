"""What retention asks about checkpoints on a tier, and the tags that keep some of them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from ckptd.errors import ConfigError, DamagedError, FencedError, NotFoundError
from ckptd.storage import catalog, keys
from ckptd.storage.catalog import Tag
from ckptd.storage.local import LocalTier
from ckptd.storage.memory import MemoryTier
from ckptd.storage.tier import Tier
from ckptd.types import CheckpointId, Held
from tests.storage.checkpoints import FIRST, JOB, LATER, fill, good


class Plain(MemoryTier):
    """A tier that has no create-only put."""

    capabilities = replace(MemoryTier.capabilities, create_only_put=False)

    def put(self, key, data, *, create_only=False, pace=None) -> None:
        """Refuse what it can't."""
        assert not create_only
        super().put(key, data, pace=pace)


@pytest.fixture(params=["local", "memory", "plain"])
def tier(request, tmp_path: Path) -> Tier:
    """Tiers with two checkpoints."""
    return fill({"local": LocalTier(tmp_path), "memory": MemoryTier(), "plain": Plain()}[request.param])


def own_bytes(checkpoint: CheckpointId) -> int:
    """What was written for a checkpoint."""
    folder = keys.checkpoint_prefix(JOB, checkpoint)
    return sum(len(data) for key, data in good().items() if key.startswith(folder) and not key.endswith(keys.MANIFEST))


def test_held_from_a_listing(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which there are, since when on this tier and how large is known without reading anything."""
    monkeypatch.setattr(type(tier), "get", None)
    held = catalog.held(tier, JOB, with_values=False)
    assert [(item.id, item.size_bytes, item.values) for item in held] == [
        (FIRST, own_bytes(FIRST), {}),
        (LATER, own_bytes(LATER), {}),
    ]
    assert all(abs(item.committed_at - time.time()) < 60 for item in held)


def test_held_with_values(tier: Tier) -> None:
    """With values, these and the time of the commit come from the manifests."""
    assert catalog.held(tier, JOB, with_values=True) == [
        Held(checkpoint, 1.5, own_bytes(checkpoint), {"loss": 0.25}) for checkpoint in (FIRST, LATER)
    ]


def test_held_leaves_out_what_is_not_committed(tier: Tier) -> None:
    """Files without a manifest are no checkpoint; a manifest that can't be parsed is one, without values."""
    tier.delete(keys.manifest_key(JOB, FIRST))
    tier.put(keys.manifest_key(JOB, LATER), b"no JSON")
    (item,) = catalog.held(tier, JOB, with_values=True)
    assert (item.id, item.values, item.size_bytes) == (LATER, {}, own_bytes(LATER))


def test_held_while_something_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was listed and is gone when its manifest or its tag is read is left out."""
    tier = fill(MemoryTier())
    catalog.put_tag(tier, JOB, "gone", FIRST, 1.0)
    real = tier.get

    def get(key: str) -> bytes:
        if key in (keys.manifest_key(JOB, FIRST), keys.tag_key(JOB, "gone")):
            raise NotFoundError("pruned")
        return real(key)

    monkeypatch.setattr(tier, "get", get)
    assert [item.id for item in catalog.held(tier, JOB, with_values=True)] == [LATER]
    assert catalog.tags(tier, JOB) == {}


def test_tags(tier: Tier) -> None:
    """Tags are given, listed with what they name, seen by retention, and taken away."""
    catalog.put_tag(tier, JOB, "best", FIRST, 5.0)
    catalog.put_tag(tier, JOB, "paper-1.0", FIRST, 6.0)
    assert catalog.tags(tier, JOB) == {"best": Tag(FIRST, 5.0), "paper-1.0": Tag(FIRST, 6.0)}
    tags_of = {item.id: sorted(item.tags) for item in catalog.held(tier, JOB, with_values=False)}
    assert tags_of == {FIRST: ["best", "paper-1.0"], LATER: []}
    catalog.remove_tag(tier, JOB, "best")
    assert set(catalog.tags(tier, JOB)) == {"paper-1.0"}
    with pytest.raises(NotFoundError):
        catalog.remove_tag(tier, JOB, "best")
    assert catalog.tags(tier, f"{JOB}-2") == {}
    assert catalog.listing(tier, JOB).committed == {FIRST, LATER}


def test_a_tag_is_moved_only_on_purpose(tier: Tier) -> None:
    """A tag that names another checkpoint stays, unless it may be moved; giving it twice changes nothing."""
    catalog.put_tag(tier, JOB, "best", FIRST, 5.0)
    catalog.put_tag(tier, JOB, "best", FIRST, 6.0)
    with pytest.raises(FencedError, match="'best'") as caught:
        catalog.put_tag(tier, JOB, "best", LATER, 7.0)
    assert caught.value.hint
    assert catalog.tags(tier, JOB) == {"best": Tag(FIRST, 5.0)}
    catalog.put_tag(tier, JOB, "best", LATER, 8.0, move=True)
    assert catalog.tags(tier, JOB) == {"best": Tag(LATER, 8.0)}


def test_only_what_is_committed_gets_a_tag(tier: Tier) -> None:
    """A tag never names a checkpoint that is not on the tier, and its name leads nowhere else."""
    with pytest.raises(NotFoundError):
        catalog.put_tag(tier, JOB, "best", CheckpointId(7, 7), 1.0)
    for name in ("", "../x", "a/b", ".hidden", "x" * 129, "line\n"):
        with pytest.raises(ConfigError, match="can't be a tag"):
            catalog.put_tag(tier, JOB, name, FIRST, 1.0)
    assert catalog.tags(tier, JOB) == {}


@pytest.mark.parametrize("document", [b"", b"[]", b"{}", b'{"generation": 1, "step": "x", "created_at": 1}'])
def test_a_damaged_tag_keeps_everything(tier: Tier, document: bytes) -> None:
    """When a tag can't be read nobody knows what it keeps: that is an error, before anything is pruned."""
    tier.put(keys.tag_key(JOB, "best"), document)
    with pytest.raises(DamagedError, match="best") as caught:
        catalog.held(tier, JOB, with_values=False)
    assert caught.value.hint
    catalog.remove_tag(tier, JOB, "best")
    assert len(catalog.held(tier, JOB, with_values=False)) == 2
