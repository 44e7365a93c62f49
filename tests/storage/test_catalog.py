"""Whole checkpoints on a tier: every kind of damage is named, in a checkpoint's own files and in what it refers to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from ckptd.errors import DamagedError, FencedError, NotFoundError, StoreError
from ckptd.storage import catalog, digest, file_stream, image, keys, manifest, ranges
from ckptd.storage.image import TensorSpec
from ckptd.storage.manifest import Place, ShardContent
from ckptd.storage.memory import MemoryTier
from ckptd.storage.packing import pack
from ckptd.types import CheckpointId

JOB = "gpt"
AT = CheckpointId(2, 40)
RANKS = 2
KEY = keys.shard_key(JOB, AT, 1)
FILE = keys.folder(AT) + "rank-00001.safetensors"


def shard(rank: int) -> bytes:
    """A complete image whose tensors differ from rank to rank."""
    specs = [TensorSpec("weight", "F32", (40, 3)), TensorSpec("empty", "F32", (0,)), TensorSpec("bias", "F16", (7,))]
    layout = image.plan(specs, 3, {})
    data = bytearray(layout.image_bytes)
    data[: len(layout.header)] = layout.header
    for span in layout.spans[:-1]:
        data[span.begin : span.end] = bytes((rank + at) % 256 for at in range(span.end - span.begin))
    image.write_values(memoryview(data), layout.values, b"abc")
    return bytes(data)


def commit(tier: MemoryTier, checkpoint: CheckpointId = AT, job: str = JOB) -> None:
    """Put a checkpoint as a flush does: shards, then the manifest."""
    contents = []
    for rank in range(RANKS):
        data = shard(rank)
        tier.put(keys.shard_key(job, checkpoint, rank), data)
        contents.append(catalog.describe_shard(rank, memoryview(data)))
    document = manifest.build(job, checkpoint, None, contents, created_at=1.0, values={})
    tier.put(keys.manifest_key(job, checkpoint), manifest.encode(document), create_only=True)


@pytest.fixture
def tier() -> MemoryTier:
    """A tier with one committed checkpoint."""
    made = MemoryTier()
    catalog.claim_generation(made, JOB, AT.generation, CheckpointId(1, 30), 1.0)
    commit(made)
    return made


def change(tier: MemoryTier, key: str, edit: Callable[[bytearray], object]) -> None:
    """Change an object in place, behind the tier's back."""
    data = bytearray(tier.get(key))
    edit(data)
    tier.put(key, bytes(data))


def span(name: str) -> tuple[int, int]:
    """Where a tensor lies in a shard."""
    (found,) = [item for item in image.parse(memoryview(shard(1))).spans if item.name == name]
    return found.begin, found.end


def flip(at: int) -> Callable[[bytearray], object]:
    """An edit that flips one bit."""

    def edit(data: bytearray) -> None:
        data[at] ^= 0x10

    return edit


def rename_tensor(data: bytearray) -> None:
    """An edit of the header that leaves all data alone."""
    data[:] = data.replace(b'"bias"', b'"boas"')


def add_empty_tensor(data: bytearray) -> None:
    """An edit that adds a tensor of no bytes to the header: every other tensor is still what it was."""
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    entries["added"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    data[8 : 8 + size] = json.dumps(entries, separators=(",", ":")).encode().ljust(size)


def add_metadata(data: bytearray) -> None:
    """An edit of the header that changes no tensor."""
    data[:] = data.replace(b'"__metadata__":{}', b'"__metadata__":{"a":"b"}').replace(b" " * 7, b"", 1)


_DAMAGE: dict[str, tuple[Callable[[bytearray], object], str]] = {
    "a flipped bit in a tensor": (flip(span("weight")[0] + 5), "tensor 'weight' is not what was committed"),
    "a flipped bit in the last byte of a tensor": (flip(span("bias")[1] - 1), "tensor 'bias' is not what was"),
    "a flipped bit in the values": (flip(span("__ckptd__.values")[1] - 1), "tensor '__ckptd__.values' is not"),
    "a flipped bit in the header's length": (flip(1), ""),
    "a flipped bit in the header's JSON": (flip(10), ""),
    "a flipped bit in the header's padding": (flip(image.BLOCK_BYTES - 2), ""),
    "a renamed tensor": (rename_tensor, "header is not what was committed"),
    "an added tensor of no bytes": (add_empty_tensor, "header is not what was committed"),
    "other metadata": (add_metadata, "header is not what was committed"),
    "a file cut short": (lambda data: data.__delitem__(slice(-1, None)), "the manifest says"),
    "a file cut to its header": (lambda data: data.__delitem__(slice(100, None)), "the manifest says"),
    "an empty file": (lambda data: data.clear(), "0 bytes"),
    "extra bytes": (lambda data: data.extend(b"\0"), "the manifest says"),
    "zeros": (lambda data: data.__setitem__(slice(None), bytes(len(data))), ""),
    "another rank's shard": (lambda data: data.__setitem__(slice(None), shard(0)), "tensor 'weight' is not"),
}


@pytest.mark.parametrize("damage", sorted(_DAMAGE))
def test_verify_names_damage(tier: MemoryTier, damage: str) -> None:
    """`verify` names the file that is damaged and what is wrong with it, and no file that is not."""
    edit, says = _DAMAGE[damage]
    change(tier, KEY, edit)
    problems = catalog.verify(tier, JOB, AT)
    assert problems
    assert all(problem.startswith(f"{FILE}: ") for problem in problems)
    assert says in " / ".join(problems)


@pytest.mark.parametrize("unit_bytes", [128, 300, 2**22])
def test_an_intact_checkpoint_is_intact(tier: MemoryTier, monkeypatch: pytest.MonkeyPatch, unit_bytes: int) -> None:
    """Nothing is found where nothing is wrong, also when a tensor of many leaves is read in many small units."""
    monkeypatch.setattr(file_stream, "_UNIT_BYTES", unit_bytes)
    for module in (ranges, digest, manifest):
        monkeypatch.setattr(module, "LEAF_BYTES", 128)
    commit(tier, CheckpointId(2, 41))
    assert catalog.verify(tier, JOB, CheckpointId(2, 41)) == []
    weight = catalog.load_manifest(tier, JOB, CheckpointId(2, 41)).tensors["weight"]
    assert [len(chunk.leaves) for chunk in weight.chunks] == [4, 4]
    change(tier, keys.shard_key(JOB, CheckpointId(2, 41), 1), flip(span("weight")[0] + 300))
    assert len(catalog.verify(tier, JOB, CheckpointId(2, 41))) == 1


def test_every_bit_counts(tier: MemoryTier) -> None:
    """A flipped bit in any byte of a shard, header and padding included, is found."""
    good = tier.get(KEY)
    for at in [*range(0, image.BLOCK_BYTES, 31), *range(image.BLOCK_BYTES, len(good), 97)]:
        tier.put(KEY, good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert catalog.verify(tier, JOB, AT), f"a flipped bit in byte {at} was not found"


_UNREADABLE: dict[str, tuple[Callable[[bytearray], object], str]] = {
    "no JSON": (lambda data: data.__setitem__(8, 0), "it is no safetensors file: a shard's header can't be read"),
    "an unknown dtype": (
        lambda data: data.__setitem__(slice(None), data.replace(b'"F16"', b'"F61"')),
        "it is no safetensors file: tensor 'bias' is of the unknown dtype 'F61'",
    ),
    "a tensor elsewhere": (
        lambda data: data.__setitem__(slice(None), data.replace(b"[480,494]", b"[481,495]")),
        "it is no safetensors file: tensor 'bias' does not lie where",
    ),
    "too short a header": (flip(0), "its header does not end where its tensors begin"),
    "another name": (rename_tensor, "its header and the manifest disagree about tensor 'boas' and 1 more"),
    "one tensor more": (add_empty_tensor, "its header and the manifest disagree about tensor 'added'"),
}


@pytest.mark.parametrize("damage", sorted(_UNREADABLE))
def test_a_file_that_is_what_was_stored_can_still_be_unreadable(tier: MemoryTier, damage: str) -> None:
    """A header that was stored as it is, but is none of safetensors or not what the manifest says, is named."""
    edit, says = _UNREADABLE[damage]
    change(tier, KEY, edit)
    key = keys.manifest_key(JOB, AT)
    document = json.loads(tier.get(key))
    own = catalog.describe_shard(1, memoryview(shard(1)))
    header = tier.get(KEY)[: len(own.layout.header)]
    in_order = [own.digests[item.name].value for item in own.layout.spans]
    document["shards"][1]["digest"] = digest.shard_digest(header, in_order)
    tier.put(key, manifest.encode(document))
    (problem,) = catalog.verify(tier, JOB, AT)
    assert problem.startswith(f"{FILE}: {says}")


def test_verify_paces_itself_and_tells_how_far_it_is(tier: MemoryTier) -> None:
    """What is read is asked for before and told of afterwards: every byte once."""
    paced: list[int] = []
    told: list[int] = []
    assert catalog.verify(tier, JOB, AT, pace=paced.append, progress=told.append) == []
    assert sum(paced) == sum(told) == RANKS * len(shard(0))


def test_a_missing_shard_is_named(tier: MemoryTier) -> None:
    """A shard that is gone is named by `verify`, with how much is gone with it."""
    tier.delete(KEY)
    assert catalog.verify(tier, JOB, AT) == [f"{FILE}: the file is missing, and 3 tensors in it"]


def test_all_problems_are_named(tier: MemoryTier) -> None:
    """`verify` does not stop at the first problem: two tensors and another rank's file are all named."""
    change(tier, KEY, flip(span("weight")[0]))
    change(tier, KEY, flip(span("bias")[0]))
    tier.delete(keys.shard_key(JOB, AT, 0))
    problems = catalog.verify(tier, JOB, AT)
    assert len(problems) == 3
    assert problems[0].startswith(f"{keys.folder(AT)}rank-00000.safetensors: the file is missing")


def test_a_tier_that_fails_is_a_problem_of_its_file(tier: MemoryTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that can't be read is a problem in words, and the others are still checked."""
    real = MemoryTier.read_into

    def failing(self: MemoryTier, key: str, offset: int, into: memoryview) -> None:
        if key.endswith("rank-00000.safetensors"):
            raise StoreError("can't read: Input/output error")
        real(self, key, offset, into)

    monkeypatch.setattr(MemoryTier, "read_into", failing)
    change(tier, KEY, flip(span("weight")[0]))
    first, second = catalog.verify(tier, JOB, AT)
    assert first == f"{keys.folder(AT)}rank-00000.safetensors: can't read: Input/output error"
    assert second.startswith(FILE)


# --- manifests --------------------------------------------------------------------------------------------------


def test_a_manifest_that_is_not_json(tier: MemoryTier) -> None:
    """It is an error with the place and a hint; to `verify` it is a problem in words."""
    key = keys.manifest_key(JOB, AT)
    tier.put(key, b"\0\0\0")
    with pytest.raises(DamagedError, match=f"{tier.url}/{key} is not JSON") as caught:
        catalog.load_manifest(tier, JOB, AT)
    assert caught.value.hint
    assert catalog.verify(tier, JOB, AT) == [f"the manifest {tier.url}/{key} is not JSON"]


@pytest.mark.parametrize(("job", "checkpoint"), [("other", AT), (JOB, CheckpointId(1, 40)), (JOB, CheckpointId(2, 50))])
def test_a_manifest_of_another_checkpoint(tier: MemoryTier, job: str, checkpoint: CheckpointId) -> None:
    """A manifest that was copied to another job, generation or step does not commit anything there."""
    commit(tier, checkpoint, job)
    tier.put(keys.manifest_key(job, checkpoint), tier.get(keys.manifest_key(JOB, AT)))
    with pytest.raises(DamagedError, match=f"is that of {JOB} {AT}"):
        catalog.load_manifest(tier, job, checkpoint)
    assert catalog.verify(tier, job, checkpoint)


def test_no_manifest_no_checkpoint(tier: MemoryTier) -> None:
    """Shards without a manifest are not committed: not listed, not found, and verify says so."""
    tier.delete(keys.manifest_key(JOB, AT))
    assert catalog.holdings(tier, JOB).committed == ()
    with pytest.raises(NotFoundError):
        catalog.load_manifest(tier, JOB, AT)
    assert len(catalog.verify(tier, JOB, AT)) == 1


def test_a_manifest_that_leaves_bytes_out(tier: MemoryTier) -> None:
    """A manifest that does not say what every byte of a shard is can't vouch for it."""
    key = keys.manifest_key(JOB, AT)
    document = json.loads(tier.get(key))
    del document["tensors"]["bias"]
    tier.put(key, manifest.encode(document))
    problems = catalog.verify(tier, JOB, AT)
    assert len(problems) == RANKS
    assert all(problem.endswith("the manifest does not say what all its bytes are") for problem in problems)


# --- what lies elsewhere ----------------------------------------------------------------------------------------


@pytest.fixture
def referring(tier: MemoryTier) -> CheckpointId:
    """A checkpoint of which rank 1 writes nothing but its values; the rest it has from `AT`."""
    later = CheckpointId(3, 50)
    whole = shard(0)
    tier.put(keys.shard_key(JOB, later, 0), whole)
    layout = image.parse(memoryview(shard(1)))
    packed = pack(memoryview(shard(1)), layout, {span.name for span in layout.spans[:-1]})
    tier.put(keys.shard_key(JOB, later, 1), b"".join(packed.parts))
    at = catalog.describe_shard(1, memoryview(shard(1)))
    own = catalog.describe_shard(1, memoryview(b"".join(packed.parts)))
    places = {span.name: Place(FILE, span.begin, span.end) for span in layout.spans[:-1]}
    stored = replace(layout, spans=(*layout.spans[:-1], packed.layout.values))
    content = ShardContent(1, stored, own.size_bytes, own.digest, {**at.digests, **own.digests}, places)
    contents = [catalog.describe_shard(0, memoryview(whole)), content]
    document = manifest.build(JOB, later, AT, contents, created_at=2.0, values={})
    tier.put(keys.manifest_key(JOB, later), manifest.encode(document), create_only=True)
    return later


def test_references_are_followed(tier: MemoryTier, referring: CheckpointId) -> None:
    """What lies in another checkpoint's file is checked there, each tensor by itself, and nothing else in that file."""
    assert catalog.verify(tier, JOB, referring) == []
    tier.delete(keys.manifest_key(JOB, AT))
    change(tier, KEY, flip(10))  # a header that is nobody's business any more
    change(tier, KEY, flip(span("__ckptd__.values")[0]))
    assert catalog.verify(tier, JOB, referring) == []
    change(tier, KEY, flip(span("bias")[0]))
    assert catalog.verify(tier, JOB, referring) == [
        f"{FILE}: tensor 'bias' is not what was committed (its digest differs)"
    ]


def test_a_file_that_is_too_short_names_what_is_lost(tier: MemoryTier, referring: CheckpointId) -> None:
    """When a file that is referred to was cut or removed, each tensor that is lost is named, or how many there are."""
    change(tier, KEY, lambda data: data.__delitem__(slice(span("bias")[1] - 1, None)))
    (problem,) = catalog.verify(tier, JOB, referring)
    assert problem.startswith(f"{FILE}: ")
    assert "too short for tensor 'bias'" in problem
    tier.delete(KEY)
    assert catalog.verify(tier, JOB, referring) == [f"{FILE}: the file is missing, and 3 tensors in it"]


# --- holdings ---------------------------------------------------------------------------------------------------


def test_holdings(tier: MemoryTier) -> None:
    """Generations with their parents and committed checkpoints in order, of this job and no other."""
    catalog.claim_generation(tier, JOB, 1, None, 0.0)
    commit(tier, CheckpointId(1, 30))
    commit(tier, CheckpointId(2, 5))
    catalog.claim_generation(tier, f"{JOB}-2", 1, None, 0.0)
    commit(tier, CheckpointId(1, 1), f"{JOB}-2")
    held = catalog.holdings(tier, JOB)
    assert held.parents == {1: None, 2: CheckpointId(1, 30)}
    assert held.committed == (CheckpointId(1, 30), CheckpointId(2, 5), AT)
    assert catalog.jobs(tier) == [JOB, f"{JOB}-2"]


def test_a_generation_is_claimed_once(tier: MemoryTier) -> None:
    """The second to claim a generation is fenced off, and the record stays the first one's."""
    with pytest.raises(FencedError):
        catalog.claim_generation(tier, JOB, AT.generation, None, 2.0)
    assert catalog.holdings(tier, JOB).parents[AT.generation] == CheckpointId(1, 30)


@pytest.mark.parametrize(
    "record",
    [b"", b"not JSON", b"[]", b"{}", b'{"parent": 7}', b'{"parent": {"generation": 1}}',
     b'{"parent": {"generation": 1e999, "step": 1}}'],
)  # fmt: skip
def test_a_damaged_generation_record_is_an_error(tier: MemoryTier, record: bytes) -> None:
    """A generation whose parent can't be read is an error with a hint: never a fresh start, never a wrong lineage."""
    key = keys.generation_key(JOB, AT.generation)
    tier.put(key, record)
    with pytest.raises(DamagedError, match=key) as caught:
        catalog.holdings(tier, JOB)
    assert caught.value.hint


def test_a_listing_reads_nothing(tier: MemoryTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generations, commits and files of a job are known from keys alone, whatever else lies there."""
    commit(tier, CheckpointId(3, 1))
    tier.delete(keys.manifest_key(JOB, CheckpointId(3, 1)))
    tier.put(f"{JOB}/notes.txt", b"not ours")
    monkeypatch.setattr(MemoryTier, "get", None)
    listed = catalog.listing(tier, JOB)
    assert (listed.generations, listed.committed) == ({AT.generation}, {AT})
    assert {name: found.checkpoint for name, found in listed.files.items()} == {
        keys.folder(checkpoint) + keys.shard_file(rank): checkpoint
        for checkpoint in (AT, CheckpointId(3, 1))
        for rank in range(RANKS)
    }
