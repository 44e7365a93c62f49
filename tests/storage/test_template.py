"""Manifests made from a template are those that `manifest.build` would make, to the last field."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import StateError
from ckptd.storage import image, manifest, template
from ckptd.storage.digest import LEAF_BYTES, TensorDigest, digest, of_leaves
from ckptd.storage.image import VALUES_NAME, TensorSpec
from ckptd.storage.manifest import Place, ShardContent
from ckptd.storage.reuse import Entry
from ckptd.storage.shards import Shards
from ckptd.types import CheckpointId, Piece

_NAMES = [
    "a",
    "digest",
    "byte_range",
    "tensors",
    '"digest":null',
    "ä☃",
    '"byte_range":[0,1],"digest":null',
    "\\",
    "large",
]
_FILE = "g000001/s000000000007/rank-00003.safetensors"


def specs(rank: int, names: list[str], world_size: int) -> list[TensorSpec]:
    """Tensors that differ between ranks in shape and dtype, or are a rank's part of a tensor of the job."""
    found = []
    for name in names:
        if name == "large":
            found.append(TensorSpec(name, "U8", (2 * LEAF_BYTES + 1,)))
        else:
            found.append(TensorSpec(name, "F32" if rank % 2 or len(name) > 2 else "U8", (rank, 3)))
    whole = Piece("whole", (2 * world_size,), (2 * rank,))
    return [*found, TensorSpec("part" if names else "whole", "F32", (2,), whole)]


def build(shards: list[ShardContent]) -> dict[str, Any]:
    """A manifest of those shards."""
    return manifest.build(
        "tensors", CheckpointId(3, 40), None, shards, created_at=1.5, values={"tensors": 0.5, "digest": float("nan")}
    )


def digest_of(rank: int, span: image.TensorSpan) -> TensorDigest:
    """A digest that tells rank and tensor, with leaves for what is large."""
    found = digest(f"{rank} {span.name}".encode())
    return of_leaves([found] * 3) if span.end - span.begin > LEAF_BYTES else TensorDigest(found)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(_NAMES), unique=True), min_size=1, max_size=3), st.booleans(), st.data())
def test_the_text_is_that_of_the_document(names: list[list[str]], digested: bool, data: st.DataObject) -> None:
    """Whatever tensors are called, share or refer to: byte for byte it is what `build` and `json` give."""
    layouts = {rank: image.plan(specs(rank, mine, len(names)), 10, {}) for rank, mine in enumerate(names)}
    full, values_only = [], []
    places: dict[Entry, Place] = {}
    values: dict[Entry, str] = {}
    leaves: dict[Entry, tuple[str, ...]] = {}
    for rank, layout in layouts.items():
        found = {span.name: digest_of(rank, span) for span in layout.spans} if digested else {}
        moved: dict[str, Place] = {}
        for span in layout.spans[:-1]:
            file = data.draw(st.sampled_from(["stays", None, _FILE]))
            if file != "stays":
                moved[span.name] = Place(file, 8, 8 + span.end - span.begin)
        places |= {Entry(rank, name): place for name, place in moved.items()}
        values |= {Entry(rank, name): item.value for name, item in found.items()}
        leaves |= {Entry(rank, name): item.leaves for name, item in found.items() if item.leaves}
        full.append(ShardContent(rank, layout, 4096, "0" * 32, found, moved))
        last = {VALUES_NAME: found[VALUES_NAME]} if digested else {}
        values_only.append(ShardContent(rank, replace(layout, spans=layout.spans[-1:]), 4096, "0" * 32, last))
    text = Shards(layouts).template.text(values if digested else None, leaves, places)
    made = template.encode(build(values_only), text)
    document = build(full)
    document["tensors"][VALUES_NAME] = document["tensors"].pop(VALUES_NAME)  # comes last
    plain = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    begin = plain.removesuffix(b"}")
    assert made == begin + f',"document_digest":"{digest(begin)}"}}\n'.encode()


def test_images_without_tensors() -> None:
    """A state of values alone has a manifest too."""
    layout = image.plan([], 10, {})
    text = Shards({0: layout}).template.text({}, {}, {})
    made = template.encode(build([ShardContent(0, layout, layout.image_bytes, None, {})]), text)
    assert set(manifest.parse(made, "here").tensors) == {VALUES_NAME}


def test_ranks_that_do_not_fit_together() -> None:
    """Parts that leave a hole are refused by name before there is any text."""
    layout = image.plan([TensorSpec("w", "F32", (2,), Piece("w", (5,), (0,)))], 10, {})
    with pytest.raises(StateError, match="'w'"):
        _ = Shards({0: layout}).template
