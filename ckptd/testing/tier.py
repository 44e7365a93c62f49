"""The conformance suite of storage tiers, driven by the capabilities that a tier declares."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from ckptd.errors import DamagedError, FencedError, NotFoundError, StoreError
from ckptd.storage import catalog, image, keys, manifest, reading
from ckptd.storage.tier import FailureGroup, Tier
from ckptd.testing.expecting import expecting, only_if
from ckptd.testing.tier_holds import HoldTests
from ckptd.testing.tier_streams import StreamTests
from ckptd.testing.working import at_once, in_turns, keys_of, pattern, raise_first
from ckptd.types import CheckpointId

_JOB = "conformance"
_BLOCK = image.BLOCK_BYTES
_SIZES = (0, 1, _BLOCK - 1, _BLOCK, _BLOCK + 1, 2**20 - 1, 2**20, 2**20 + _BLOCK, 5 * 2**20 + 1, 9 * 2**20)
"""Around every boundary at which a tier may change how it writes: a block, a part, a direct write."""


class TierSuite(StreamTests, HoldTests):
    """The contract of `ckptd.storage.tier.Tier`: subclass it and give it a `tier` fixture.

    The fixture yields an empty tier, a new one for each test. What the tier does not declare in its `Capabilities` is
    not asked of it, except that it must not pretend. A tier that outlives its process should override `reopen`, so
    that the suite can look at its objects through another one; a tier whose killed puts leave something behind should
    override `litter`, and one that can hold jobs `holder`.
    """

    # --- one object -------------------------------------------------------------------------------------------

    def test_describes_itself(self, tier: Tier) -> None:
        """Name and URL are what logs, `ls` and incidents can show: one word, and no credentials."""
        assert tier.name
        assert not any(character.isspace() for character in tier.name)
        assert tier.url
        user, at, _ = tier.url.partition("://")[2].partition("/")[0].rpartition("@")
        assert not (at and ":" in user), "a URL with credentials reaches logs"

    def test_returns_what_was_put(self, tier: Tier) -> None:
        """Every size comes back byte for byte, whole and in place."""
        for size in _SIZES:
            data = pattern(size, seed=size)
            tier.put(f"sizes/{size}", data)
            assert tier.size_bytes(f"sizes/{size}") == size
            assert tier.get(f"sizes/{size}") == data, f"{size} bytes came back changed"
            into = memoryview(bytearray(size))
            tier.read_into(f"sizes/{size}", 0, into)
            assert into == data, f"{size} bytes were read changed"

    def test_takes_any_buffer(self, tier: Tier) -> None:
        """A writable view, a read-only view and a view that begins anywhere are put like bytes."""
        data = pattern(3 * 2**20, seed=1)
        for name, buffer in (
            ("writable", memoryview(bytearray(data))),
            ("read-only", memoryview(data)),
            ("unaligned", memoryview(b"x" + data)[1:]),
        ):
            tier.put(f"buffers/{name}", buffer)
            assert tier.get(f"buffers/{name}") == data, f"a {name} view was put changed"

    def test_puts_several_buffers_as_one(self, tier: Tier) -> None:
        """A sequence of buffers of any sizes becomes one object, end to end, whatever their alignment."""
        data = pattern(7 * 2**20 + 5, seed=10)
        for name, cuts in (
            ("none", ()),
            ("one", (7 * 2**20,)),
            ("blocks", (_BLOCK, 2**20, 5 * 2**20)),
            ("odd", (0, 0, 1, 100, 2 * 2**20 + 7, 7 * 2**20 + 5)),
        ):
            view = memoryview(data)[: cuts[-1] if cuts else 0]
            parts = [view[begin:end] for begin, end in zip((0, *cuts), cuts, strict=False)]
            tier.put(f"parts/{name}", parts)
            assert tier.get(f"parts/{name}") == view, f"parts cut at {cuts} were put changed"
            assert tier.size_bytes(f"parts/{name}") == len(view)

    def test_asks_before_it_moves(self, tier: Tier) -> None:
        """`pace` is asked for every byte of a put exactly once, so that a bound on bandwidth means what it says."""
        for size in (10, 2**20 + 5, 9 * 2**20):
            asked: list[int] = []
            tier.put("paced", pattern(size, seed=9), pace=asked.append)
            assert sum(asked) == size, f"a put of {size} bytes asked for {sum(asked)}"
            assert tier.get("paced") == pattern(size, seed=9)

    def test_keeps_no_reference(self, tier: Tier) -> None:
        """What is put is kept as it was then: slots are written again as soon as a flush is over."""
        for size in (16, 2 * 2**20):
            buffer = bytearray(pattern(size, seed=2))
            tier.put("kept", memoryview(buffer))
            buffer[:] = bytes(size)
            assert tier.get("kept") == pattern(size, seed=2)

    def test_replaces_whole(self, tier: Tier) -> None:
        """A second put leaves nothing of the first, be it longer or shorter."""
        for size in (2 * 2**20, 10, 2**20 + 7):
            tier.put("replaced", pattern(size, seed=size))
            assert tier.get("replaced") == pattern(size, seed=size)

    def test_reads_ranges(self, tier: Tier) -> None:
        """Any range fills just the memory it was given, to its last byte."""
        data = pattern(4 * 2**20, seed=3)
        tier.put("ranges", data)
        for offset, size in ((0, 8), (1, 1), (_BLOCK, 2**20), (_BLOCK - 1, 2**20 + 2), (2**20, 3 * 2**20), (77, 0)):
            room = memoryview(bytearray(size + 2))
            tier.read_into("ranges", offset, room[1 : size + 1])
            assert room[1 : size + 1] == data[offset : offset + size], f"bytes {offset} + {size} are wrong"
            assert (room[0], room[-1]) == (0, 0), f"reading {offset} + {size} wrote outside its memory"

    def test_a_range_behind_the_end_is_damage(self, tier: Tier) -> None:
        """An object that ends before the wanted range does is damaged: never a short read, never stale memory."""
        for size in (10, _BLOCK, 2**20 + 1, 2 * 2**20):
            tier.put("short", pattern(size, seed=4))
            for offset, wanted in ((0, size + 1), (size - 1, 2), (size, 1), (size + _BLOCK, 8), (0, size + 2**20)):
                with expecting(DamagedError, f"{wanted} bytes from {offset} of {size} were read"):
                    tier.read_into("short", offset, memoryview(bytearray(wanted)))

    def test_opens_for_reading(self, tier: Tier) -> None:
        """A descriptor reads the object as it was when it was opened, can't write it, and outlives its deletion."""
        data = pattern(2**20 + 5, seed=8)
        tier.put("opened", data)
        descriptor = tier.open("opened")
        try:
            assert not os.get_inheritable(descriptor), "a descriptor leaks into every program that is started"
            tier.put("opened", b"another")
            tier.delete("opened")
            assert os.fstat(descriptor).st_size == len(data)
            assert os.pread(descriptor, len(data) + 1, 0) == data
            assert os.pread(descriptor, 100, 2**20) == data[2**20 :]
            with expecting(OSError, "a descriptor for reading could be written"):
                os.pwrite(descriptor, b"x", 0)
        finally:
            os.close(descriptor)

    def test_a_missing_object_is_named(self, tier: Tier) -> None:
        """Reading what isn't there raises `NotFoundError` with the key in its message."""
        tier.put("there/object", b"1")
        for key in ("nowhere", "there/nowhere", "no/such/folder/nowhere"):
            for read in (
                tier.get,
                tier.size_bytes,
                tier.open,
                lambda key: tier.read_into(key, 0, memoryview(bytearray(1))),
            ):
                with expecting(NotFoundError, f"{key} was read") as caught:
                    read(key)
                assert "nowhere" in caught.error.message

    def test_outlives_its_process(self, tier: Tier) -> None:
        """Another tier at the same place finds what this one has put."""
        only_if(
            tier.capabilities.failure_group is not FailureGroup.PROCESS,
            "the tier declares that it is lost with its process",
        )
        tier.put("a/kept", pattern(2**20, seed=5))
        other = self.reopen(tier)
        only_if(other is not None, "`reopen` is not overridden")
        assert other is not None
        assert other.get("a/kept") == pattern(2**20, seed=5)
        assert [entry.key for entry in other.list("")] == ["a/kept"]

    def test_says_that_it_is_writable(self, tier: Tier) -> None:
        """`check_writable` passes on a tier that works, from many threads at once, and leaves nothing behind."""
        tier.put("before", b"1")
        raise_first(at_once(self.racers, lambda _: tier.check_writable()))
        assert keys_of(tier, "") == {"before"}

    # --- listing and deleting ---------------------------------------------------------------------------------

    def test_lists_by_prefix(self, tier: Tier) -> None:
        """A prefix is a prefix of characters: it finds all keys that start so, and no neighbour."""
        everything = {"job/g000001/generation.json", "job/g000001/s1/a", "job/g000002/s1/a", "job-2/g000001/b", "top"}
        for key in everything:
            tier.put(key, b"x")
        for prefix in ("", "job/", "job", "job-", "job/g000001/", "job/g00", "job/g000001/s1/a", "t", "nothing/", "z"):
            wanted = {key for key in everything if key.startswith(prefix)}
            assert keys_of(tier, prefix) == wanted, f"the listing of {prefix!r} is wrong"

    def test_lists_sizes_and_times(self, tier: Tier) -> None:
        """An entry says how large its object is and when it was put, by the wall clock."""
        before = time.time()
        tier.put("job/entry", b"12345")
        (entry,) = tier.list("job/")
        assert (entry.key, entry.size_bytes) == ("job/entry", 5)
        assert before - 60 < entry.modified_at < time.time() + 60, "the time of an entry is not that of its put"

    def test_an_empty_tier_lists_nothing(self, tier: Tier) -> None:
        """Nothing was put, so nothing is listed, and that is no error."""
        assert keys_of(tier, "") == set()
        assert keys_of(tier, "job/g000001/") == set()

    def test_deletes_one_object(self, tier: Tier) -> None:
        """A deleted object is gone from every call, and its neighbours stay."""
        for key in ("job/s1/a", "job/s1/ab", "job/s2/a"):
            tier.put(key, b"x")
        tier.delete("job/s1/a")
        assert keys_of(tier, "") == {"job/s1/ab", "job/s2/a"}
        with expecting(NotFoundError, "a deleted object was read"):
            tier.get("job/s1/a")
        tier.put("job/s1/a", b"again")
        assert tier.get("job/s1/a") == b"again"

    def test_deleting_nothing_is_no_error(self, tier: Tier) -> None:
        """Two prunes may meet: what is gone already can be deleted again."""
        tier.put("job/a", b"x")
        for key in ("job/a", "job/a", "job/never", "never/never/never"):
            tier.delete(key)
        assert keys_of(tier, "") == set()

    # --- create only ------------------------------------------------------------------------------------------

    def test_create_only_leaves_what_is_there(self, tier: Tier) -> None:
        """A create-only put of an existing key is refused with `FencedError`, and nothing changes."""
        only_if(tier.capabilities.create_only_put, "the tier declares no create-only put")
        tier.put("claimed", b"first", create_only=True)
        for size in (6, 2 * 2**20):
            with expecting(FencedError, "an existing key was claimed"):
                tier.put("claimed", pattern(size, seed=6), create_only=True)
        assert tier.get("claimed") == b"first"
        assert keys_of(tier, "") == {"claimed"}

    def test_create_only_has_one_winner(self, tier: Tier) -> None:
        """However many race for a key, one put succeeds, and the object is the winner's."""
        only_if(tier.capabilities.create_only_put, "the tier declares no create-only put")
        for turn in range(10):
            key = f"races/{turn}"
            with in_turns():
                errors = at_once(self.racers, partial(_claim, tier, key))
            winners = [number for number, error in enumerate(errors) if error is None]
            assert len(winners) == 1, f"{len(winners)} of {self.racers} created {key}"
            assert tier.get(key) == b"%d" % winners[0]
            losers = [error for error in errors if error is not None]
            assert all(isinstance(error, FencedError) for error in losers), f"a loser got {losers}"

    def test_does_not_pretend_to_create_only(self, tier: Tier) -> None:
        """A tier without create-only put refuses one as a `StoreError`, instead of checking first and then writing."""
        only_if(not tier.capabilities.create_only_put, "the tier declares create-only put")
        with expecting(StoreError, "a create-only put was taken"):
            tier.put("claimed", b"first", create_only=True)
        assert keys_of(tier, "") == set()

    # --- all at once ------------------------------------------------------------------------------------------

    def test_is_seen_whole_or_not_at_all(self, tier: Tier) -> None:
        """A reader beside a writer finds the old object, the new one or none: never a part, never a mixture."""
        old, new = b"o" * (2**20 + 1), b"n" * (3 * 2**20)
        over = threading.Event()

        def look(_: int) -> None:
            while not over.is_set():
                try:
                    found = tier.get("job/torn")
                except NotFoundError:
                    continue
                assert found in (old, new), f"a reader found {len(found)} bytes of {set(found[:: 2**18])}"
                assert {entry.size_bytes for entry in tier.list("job/torn")} <= {len(old), len(new)}

        def write_and_look(number: int) -> None:
            if number:
                look(number)
                return
            try:
                for _ in range(10):
                    tier.put("job/torn", old)
                    tier.put("job/torn", new)
            finally:
                over.set()

        raise_first(at_once(3, write_and_look))

    def test_replaces_at_once(self, tier: Tier) -> None:
        """With `atomic_replace` there is no moment at which an object that is being replaced is missing."""
        only_if(tier.capabilities.atomic_replace, "the tier declares no atomic replace")
        tier.put("job/replaced", b"0" * 1000)
        over = threading.Event()

        def work(number: int) -> None:
            while number and not over.is_set():
                found = tier.get("job/replaced")
                assert len(found) == 1000 == tier.size_bytes("job/replaced")
            try:
                for turn in range(0 if number else 20):
                    tier.put("job/replaced", b"%d" % (turn % 10) * 1000)
            finally:
                over.set()

        raise_first(at_once(3, work))

    def test_puts_do_not_disturb_each_other(self, tier: Tier) -> None:
        """Many threads put, read and delete neighbours at once, and each finds its own bytes."""

        def work(number: int) -> None:
            for turn in range(5):
                key = f"job/s{turn}/rank-{number}"
                tier.put(key, pattern(100_000 + number, seed=number))
                assert tier.get(key) == pattern(100_000 + number, seed=number)
                if turn % 2:
                    tier.delete(key)
                list(tier.list("job/"))

        tier.put("job/stays", b"x")
        raise_first(at_once(self.racers, work))
        assert len(keys_of(tier, "job/s")) == 3 * self.racers + 1

    def test_keeps_a_checkpoint(self, tier: Tier) -> None:
        """A checkpoint can be committed, listed, verified, read and deleted: what the agent does with a tier."""
        checkpoint = CheckpointId(1, 40)
        images = [_image(rank) for rank in range(2)]
        if tier.capabilities.create_only_put:
            catalog.claim_generation(tier, _JOB, 1, None, 0.0)
        contents = [catalog.describe_shard(rank, data) for rank, data in enumerate(images)]
        for rank, data in enumerate(images):
            tier.put(keys.shard_key(_JOB, checkpoint, rank), data)
        document = manifest.build(_JOB, checkpoint, None, contents, created_at=0.0, values={"loss": 0.5})
        tier.put(keys.manifest_key(_JOB, checkpoint), manifest.encode(document))
        assert catalog.holdings(tier, _JOB).committed == (checkpoint,)
        assert catalog.verify(tier, _JOB, checkpoint) == []
        _read_back(tier, catalog.load_manifest(tier, _JOB, checkpoint), images)
        for key in keys_of(tier, keys.checkpoint_prefix(_JOB, checkpoint)):
            tier.delete(key)
        assert keys_of(tier, keys.checkpoint_prefix(_JOB, checkpoint)) == set()
        assert catalog.verify(tier, _JOB, checkpoint) != []


def _read_back(tier: Tier, loaded: manifest.Manifest, images: Sequence[memoryview]) -> None:
    """Read every tensor as a restore does, and compare it with its image."""
    found = [bytearray(len(data)) for data in images]

    def keep(chunk: manifest.Chunk, offset: int, data: memoryview) -> None:
        found[chunk.shard][chunk.begin + offset : chunk.begin + offset + len(data)] = data

    wants = [
        reading.Want(tensor.name, chunk, 0, chunk.end - chunk.begin, partial(keep, chunk))
        for tensor in loaded.tensors.values()
        for chunk in tensor.chunks
    ]
    with ExitStack() as stack:
        files = {file: tier.open(f"{_JOB}/{file}") for file in loaded.files}
        for descriptor in files.values():
            stack.callback(os.close, descriptor)
        reading.read(wants, files, threads=2, direct=True)
    for data, image_found in zip(images, found, strict=True):
        begin = image.parse(data).spans[0].begin
        assert image_found[begin:] == data[begin:], "a restore would read something else than was put"


def _image(rank: int) -> memoryview:
    """Return a small complete shard image."""
    spec = image.TensorSpec("weight", "F32", (300_000 + rank,))
    layout = image.plan([spec], 3, {})
    data = memoryview(bytearray(layout.image_bytes))
    data[: len(layout.header)] = layout.header
    span = layout.spans[0]
    data[span.begin : span.end] = pattern(span.end - span.begin, seed=rank)
    image.write_values(data, layout.values, b"abc")
    return data


def _claim(tier: Tier, key: str, number: int) -> None:
    tier.put(key, b"%d" % number, create_only=True)
