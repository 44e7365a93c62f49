"""The manifest: what is written is read back, and everything that is not a complete manifest is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptd.errors import DamagedError, StateError
from ckptd.storage import image, manifest
from ckptd.storage.digest import LEAF_BYTES, TensorDigest, digest, of_leaves
from ckptd.storage.image import VALUES_NAME, TensorSpec
from ckptd.storage.manifest import Place, ShardContent
from ckptd.types import CheckpointId, Piece
from ckptd.version import __version__

_IDS = st.builds(CheckpointId, st.integers(1, 10**6), st.integers(0, 10**12))


def content(rank: int, specs: list[TensorSpec]) -> ShardContent:
    """What a flush knows of a shard, with digests that tell rank and tensor."""
    layout = image.plan(specs, 10, {})
    digests = {span.name: TensorDigest(digest(f"{rank} {span.name}".encode())) for span in layout.spans}
    return ShardContent(rank, layout, layout.image_bytes, f"{rank:032x}", digests)


def part(tensor: str, whole: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]) -> TensorSpec:
    """A part of a tensor of the job."""
    return TensorSpec(tensor, "F32", shape, Piece(tensor, whole, offset))


def build(shards: list[ShardContent]) -> dict[str, Any]:
    """A manifest of those shards."""
    return manifest.build("gpt", CheckpointId(3, 40), None, shards, created_at=0.0, values={})


def document(ranks: int = 2) -> dict[str, Any]:
    """A manifest of `ranks` shards with one tensor each."""
    shards = [content(rank, [TensorSpec("weight", "F32", (2, 3))]) for rank in range(ranks)]
    return manifest.build(
        "gpt", CheckpointId(3, 40), CheckpointId(2, 30), shards, created_at=12.5, values={"loss": 0.25}
    )


@settings(max_examples=50, deadline=None)
@given(
    _IDS,
    st.none() | _IDS,
    st.lists(st.lists(st.sampled_from(["a", "b", "ä☃", "x" * 50]), unique=True), min_size=1, max_size=5),
    st.floats(0, 1e12),
    st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False), max_size=3),
)
def test_round_trip(
    checkpoint: CheckpointId,
    parent: CheckpointId | None,
    names: list[list[str]],
    created_at: float,
    values: dict[str, float],
) -> None:
    """What was built and encoded is parsed back: names, parents, sizes, digests and values, for any set of ranks."""
    shards = [content(rank, [TensorSpec(name, "F32", (rank,)) for name in mine]) for rank, mine in enumerate(names)]
    built = manifest.build("gpt", checkpoint, parent, shards, created_at=created_at, values=values)
    read = manifest.parse(manifest.encode(built), "here")
    assert (read.job, read.id, read.parent, read.created_at) == ("gpt", checkpoint, parent, created_at)
    assert read.world_size == len(names)
    assert read.values == values
    *fields, (last, found) = read.document.items()
    assert dict(fields) == json.loads(json.dumps(built))
    assert last == "document_digest"
    assert isinstance(found, str)
    for shard, given_shard in zip(read.shards, shards, strict=True):
        assert (shard.rank, shard.digest) == (given_shard.rank, given_shard.digest)
        assert shard.size_bytes == given_shard.layout.image_bytes
        chunks = {
            chunk.entry: chunk
            for tensor in read.tensors.values()
            for chunk in tensor.chunks
            if chunk.shard == shard.rank
        }
        assert {name: chunk.digest for name, chunk in chunks.items()} == {
            name: found.value for name, found in given_shard.digests.items()
        }
        assert {(chunk.entry, chunk.begin, chunk.end) for chunk in chunks.values()} == {
            (span.name, span.begin, span.end) for span in given_shard.layout.spans
        }
        assert not any(read.refers(chunk) for chunk in chunks.values())
    assert read.state_bytes == sum(shard.layout.image_bytes - len(shard.layout.header) for shard in shards)
    assert read.size_bytes == sum(shard.layout.image_bytes for shard in shards)


def test_it_is_the_documented_document() -> None:
    """The manifest has the keys of format 1 that the design promises to readers that know only JSON."""
    read = json.loads(manifest.encode(document()))
    assert read["format"] == 1
    assert read["complete"] is True
    assert read["producer"] == {"ckptd": __version__}
    assert read["parent"] == {"generation": 2, "step": 30}
    assert [shard["file"] for shard in read["shards"]] == ["rank-00000.safetensors", "rank-00001.safetensors"]
    assert set(read["tensors"]) == {"weight", VALUES_NAME}
    weight = read["tensors"]["weight"]
    assert (weight["dtype"], weight["shape"], weight["placement"]) == ("F32", [2, 3], "rank")
    assert [chunk["shard"] for chunk in weight["chunks"]] == [0, 1]
    begin, end = weight["chunks"][0]["byte_range"]
    assert end - begin == 2 * 3 * 4


def test_ranks_may_differ() -> None:
    """Where ranks differ in shape or dtype, the tensor's own is null and each chunk says its shape."""
    shards = [
        content(
            0, [TensorSpec("shape", "F32", (2,)), TensorSpec("dtype", "F32", (2,)), TensorSpec("only-0", "U8", ())]
        ),
        content(1, [TensorSpec("shape", "F32", (3,)), TensorSpec("dtype", "F16", (2,))]),
    ]
    built = build(shards)
    tensors = json.loads(manifest.encode(built))["tensors"]
    assert (tensors["shape"]["shape"], tensors["shape"]["dtype"]) == (None, "F32")
    assert [chunk["shape"] for chunk in tensors["shape"]["chunks"]] == [[2], [3]]
    assert (tensors["dtype"]["shape"], tensors["dtype"]["dtype"]) == ([2], None)
    assert [chunk["shard"] for chunk in tensors["only-0"]["chunks"]] == [0]
    read = manifest.parse(manifest.encode(built), "here")
    assert [chunk.shard for chunk in read.tensors["only-0"].chunks] == [0]
    assert [chunk.dtype for chunk in read.tensors["dtype"].chunks] == ["F32", "F16"]
    assert [chunk.shape for chunk in read.tensors["shape"].chunks] == [(2,), (3,)]


# --- tensors of the job -----------------------------------------------------------------------------------------


def test_parts_of_a_tensor_of_the_job() -> None:
    """A tensor that ranks share out is one tensor of the whole shape, with a box for each part, whoever has several."""
    two = TensorSpec("w~2", "F32", (1, 4), Piece("w", (4, 4), (3, 0)))
    shards = [content(0, [part("w", (4, 4), (0, 0), (2, 4)), two]), content(1, [part("w", (4, 4), (2, 0), (1, 4))])]
    read = manifest.parse(manifest.encode(build(shards)), "here")
    tensor = read.tensors["w"]
    assert (tensor.placement, tensor.shape) == ("job", (4, 4))
    assert [(chunk.shard, chunk.entry, chunk.offset, chunk.shape) for chunk in tensor.chunks] == [
        (0, "w", (0, 0), (2, 4)),
        (0, "w~2", (3, 0), (1, 4)),
        (1, "w", (2, 0), (1, 4)),
    ]


def test_an_empty_part_is_no_part_too_many() -> None:
    """A rank whose share is empty does not stand in the way, wherever its share would begin."""
    shards = [content(0, [part("w", (2,), (0,), (2,))])]
    shards += [content(rank, [part("w", (2,), (2,), (0,))]) for rank in (1, 2)]
    assert len(manifest.parse(manifest.encode(build(shards)), "here").tensors["w"].chunks) == 3


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([part("w", (4,), (0,), (2,)), part("w", (4,), (2,), (1,))], "do not make up the whole"),
        ([part("w", (4,), (0,), (2,)), part("w", (4,), (0,), (2,))], "do not make up the whole"),
        ([part("w", (4,), (0,), (4,)), part("w", (4,), (1,), (2,))], "do not make up the whole"),
        ([part("w", (4,), (0,), (2,)), part("w", (5,), (2,), (2,))], "disagree"),
        ([part("w", (4,), (0,), (4,)), TensorSpec("w", "F32", (4,))], "disagree"),
        ([TensorSpec("w", "F32", (4,)), part("w", (4,), (0,), (4,))], "disagree"),
    ],
)
def test_ranks_that_do_not_fit_together_are_refused(parts: list[TensorSpec], says: str) -> None:
    """What the ranks hold of a tensor of the job makes up the whole tensor, or there is no manifest, with its name."""
    with pytest.raises(StateError, match=says) as caught:
        build([content(rank, [spec]) for rank, spec in enumerate(parts)])
    assert "'w'" in caught.value.message
    assert caught.value.hint


def test_places_and_leaves() -> None:
    """What lies elsewhere says where, and what has several leaves lists their digests."""
    spec = TensorSpec("big", "U8", (2 * LEAF_BYTES + 1,))
    plain = content(0, [spec])
    size = spec.size_bytes
    leaves = of_leaves(digest(bytes([at])) for at in range(3))
    digests = {**plain.digests, "big": leaves}
    file = "g000001/s000000000007/rank-00003.safetensors"
    moved = ShardContent(0, plain.layout, 4096, None, digests, {"big": Place(file, 100, 100 + size)})
    built = build([moved])
    (chunk,) = built["tensors"]["big"]["chunks"]
    assert (chunk["file"], list(chunk["byte_range"]), list(chunk["leaves"])) == (
        file,
        [100, 100 + size],
        list(leaves.leaves),
    )
    read = manifest.parse(manifest.encode(built), "here")
    (found,) = read.tensors["big"].chunks
    assert (found.file, found.begin, found.digest, found.leaves) == (file, 100, *leaves)
    assert read.refers(found)
    assert read.files == {file, "g000003/s000000000040/rank-00000.safetensors"}
    assert (read.size_bytes, read.state_bytes) == (4096, size + plain.layout.values.end - plain.layout.values.begin)


def test_a_snapshot_has_no_digests() -> None:
    """The document of a snapshot in memory that was not digested is read, and says so with None."""
    layout = image.plan([TensorSpec("big", "U8", (2 * LEAF_BYTES,))], 10, {})
    read = manifest.parse(manifest.encode(build([ShardContent(0, layout, layout.image_bytes, None, {})])), "here")
    assert read.shards[0].digest is None
    assert {chunk.digest for tensor in read.tensors.values() for chunk in tensor.chunks} == {None}


def test_shards_are_found_by_rank() -> None:
    """`shards[rank]` is that rank's shard in whatever order the document lists them."""
    mixed = document(3)
    mixed["shards"] = [mixed["shards"][at] for at in (2, 0, 1)]
    read = manifest.parse(manifest.encode(mixed), "here")
    assert [shard.rank for shard in read.shards] == [0, 1, 2]
    assert [shard.digest for shard in read.shards] == [f"{rank:032x}" for rank in range(3)]


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 4096, b"not JSON", b'{"format": 1,', b"\xff\xfe", b"[" * 100_000, manifest.encode(document())[:-20]],
    ids=["empty", "zeros", "text", "cut", "no text", "deep", "cut short"],
)
def test_what_is_not_json_is_damaged(data: bytes) -> None:
    """A file that is no JSON is a `DamagedError` with its place and a hint, never a silent absence."""
    with pytest.raises(DamagedError, match="the manifest here is not JSON") as caught:
        manifest.parse(data, "here")
    assert caught.value.hint


@pytest.mark.parametrize("key", sorted(set(document()) - {"producer"}))
def test_a_missing_key_is_named(key: str) -> None:
    """A manifest without one of its keys is damaged, and the message names place and key."""
    lacking = document()
    del lacking[key]
    with pytest.raises(DamagedError, match=f"the manifest here lacks '{key}'"):
        manifest.parse(manifest.encode(lacking), "here")


def _changed(**fields: Any) -> dict[str, Any]:
    return {**document(), **fields}


def _named(file: str) -> list[dict[str, Any]]:
    """The shards, of which the second one's file has another name."""
    first, second = document()["shards"]
    return [first, second | {"file": file}]


@pytest.mark.parametrize(
    ("spoiled", "says"),
    [
        (_changed(format=2), "has format 2, this ckptd reads 1"),
        (_changed(format="1"), "has format '1'"),
        (_changed(complete=False), "does not say that it is complete"),
        (_changed(complete="true"), "does not say that it is complete"),
        (_changed(world_size=3), "the shards of all ranks"),
        (_changed(world_size=1), "the shards of all ranks"),
        (_changed(world_size=10**15), "the shards of all ranks"),
        (_changed(shards=document()["shards"][:1]), ""),
        (_changed(shards=[document()["shards"][0]] * 2), ""),
        (_changed(shards=[]), ""),
        (_changed(shards={}), ""),
        (_changed(shards=[{"rank": 0}, {"rank": 1}]), "'file'"),
        (_changed(shards=_named("../../../g000001/s000000000001/rank-00001.safetensors")), "the file"),
        (_changed(shards=_named("/etc/passwd")), "the file"),
        (_changed(tensors=[]), ""),
        (_changed(tensors={"weight": {"chunks": []}}), "lacks 'placement'"),
        (_changed(tensors={"w": document()["tensors"]["weight"] | {"chunks": []}}), "no chunks"),
        (_changed(tensors={"w": document()["tensors"]["weight"] | {"placement": "node"}}), "placement 'node'"),
        (_changed(digest="crc32"), "digests of an unknown kind"),
        (_changed(leaf_bytes=7), "digests of an unknown kind"),
        (_changed(step=float("inf")), ""),
        (_changed(step=None), ""),
        (_changed(created_at="yesterday"), ""),
        (_changed(created_at=10**400), ""),
        (_changed(parent={}), "'generation'"),
        (_changed(parent=7), ""),
        (_changed(values=[1]), ""),
        (_changed(values={"loss": "low"}), ""),
    ],
    ids=range(28),
)
def test_a_manifest_that_lies_is_damaged(spoiled: dict[str, Any], says: str) -> None:
    """What is of another format or type, incomplete or names files elsewhere is a `DamagedError` with its place."""
    with pytest.raises(DamagedError, match="the manifest here") as caught:
        manifest.parse(json.dumps(spoiled).encode(), "here")
    assert says in caught.value.message


_CHUNK = document()["tensors"]["weight"]["chunks"][0]


@pytest.mark.parametrize(
    ("spoiled", "says"),
    [
        ({"shard": 2}, "no shard 2"),
        ({"shard": -1}, "no shard -1"),
        ({"shard": "0"}, "no shard '0'"),
        ({"shard": True}, "no shard True"),
        ({"byte_range": [4096, 4100]}, "byte range"),
        ({"byte_range": [-24, 0]}, ""),
        ({"byte_range": [0]}, ""),
        ({"shape": [2, 2]}, "byte range"),
        ({"shape": [-2, -3]}, ""),
        ({"shape": [3.0, 2.0]}, ""),
        ({"offset": "00"}, ""),
        ({"digest": "no hex"}, "digest"),
        ({"digest": "00"}, "digest"),
        ({"digest": 7}, "digest"),
        ({"leaves": ["0" * 32]}, "leaves"),
        ({"file": "/etc/passwd"}, "the file '/etc/passwd'"),
        ({"file": "../other/g000001/s000000000001/rank-00000.safetensors"}, "the file"),
        ({"file": "g000001/s000000000001/../manifest.json"}, "the file"),
        ({"file": "rank-00000.safetensors"}, "the file"),
        ({"file": 7}, ""),
    ],
    ids=range(20),
)
def test_a_chunk_that_lies_is_damaged(spoiled: dict[str, Any], says: str) -> None:
    """A chunk of an impossible shard, range, shape, digest or file is a `DamagedError`: no reader meets it."""
    lying = document()
    lying["tensors"]["weight"]["chunks"][0] = _CHUNK | spoiled
    with pytest.raises(DamagedError, match="the manifest here") as caught:
        manifest.parse(json.dumps(lying).encode(), "here")
    assert says in caught.value.message


@pytest.mark.parametrize("data", [b"[]", b"7", b"null", b'"text"'])
def test_json_that_is_no_object_is_damaged(data: bytes) -> None:
    """JSON of another kind is a `DamagedError` too."""
    with pytest.raises(DamagedError, match="the manifest here"):
        manifest.parse(data, "here")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["rank", "chunks", "shard"]), inner),
    max_leaves=6,
)


@settings(max_examples=120, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(document())), _JSON, max_size=3))
@example({"world_size": float("inf")})
@example({"world_size": 2**70})
def test_any_json_raises_only_damaged_errors(changes: dict[str, Any]) -> None:
    """Whatever JSON stands in the fields of a manifest, reading it works or raises a `DamagedError`."""
    try:
        manifest.parse(json.dumps({**document(), **changes}).encode(), "here")
    except DamagedError as error:
        assert "here" in error.message
