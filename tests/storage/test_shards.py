"""The entries of a snapshot's images: leaves cover every byte once, and what did not change is not read again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptd.storage import image
from ckptd.storage.digest import LEAF_BYTES
from ckptd.storage.image import VALUES_NAME, TensorSpec
from ckptd.storage.reuse import Entry
from ckptd.storage.shards import Shards, shards_of

_SIZES = [0, 1, 4096, LEAF_BYTES, LEAF_BYTES + 1, 3 * LEAF_BYTES]


def shards(*sizes: list[int]) -> Shards:
    """The shards of ranks with tensors of such sizes."""
    return Shards(
        {
            rank: image.plan([TensorSpec(f"t{at}", "U8", (size,)) for at, size in enumerate(mine)], 10, {})
            for rank, mine in enumerate(sizes)
        }
    )


@given(st.lists(st.sampled_from(_SIZES), max_size=6), st.sets(st.integers(0, 6)))
def test_leaves_cover_everything(sizes: list[int], chosen: set[int]) -> None:
    """Each entry's leaves are its bytes in pieces of one leaf, an empty one has one, and a choice parts them in two."""
    made = shards(sizes)
    names = {Entry(0, f"t{at}") for at in chosen}
    of_chosen, of_others = made.split_leaves(names)
    seen: dict[Entry, list[slice]] = {}
    for leaves, are_chosen in ((of_chosen.get(0), True), (of_others[0], False)):
        if leaves is None:
            continue
        for entry, part in zip(leaves.entries, leaves.parts, strict=True):
            assert (entry in names) == are_chosen
            seen.setdefault(entry, []).append(part)
    assert seen.keys() == made.spans.keys()
    for entry, parts in seen.items():
        span = made.spans[entry]
        assert (parts[0].start, parts[-1].stop) == (span.begin, span.end)
        assert all(part.stop - part.start == LEAF_BYTES for part in parts[:-1])
        assert parts[-1].stop - parts[-1].start <= LEAF_BYTES
        assert made.leaves[0].several.get(entry, 1) == len(parts)


def test_contents_are_of_what_is_digested() -> None:
    """What is empty, the values and what has no digest have no content; what differs in size differs in content."""
    made = shards([1, 0, 4], [2])
    digests = dict.fromkeys(made.spans, "d")
    del digests[Entry(0, "t2")]
    contents = made.contents(digests)
    assert contents.keys() == {Entry(0, "t0"), Entry(1, "t0")}
    assert len(set(contents.values())) == 2
    assert Entry(0, VALUES_NAME) in made.spans


def test_unchanged_layouts_are_not_read_again() -> None:
    """The shards of the same headers are the same object; a rank whose header changed is read, no other is."""
    layouts = [image.plan([TensorSpec("t", "U8", (size,))], 10, {}) for size in (10, 20)]
    images = {rank: bytearray(layouts[0].image_bytes) for rank in range(2)}
    for data in images.values():
        data[: len(layouts[0].header)] = layouts[0].header
    views = {rank: memoryview(data) for rank, data in images.items()}
    first = shards_of(views, Shards({}))
    assert first.layouts[0] == layouts[0]
    assert shards_of(views, first) is first
    images[1][: len(layouts[1].header)] = layouts[1].header
    second = shards_of(views, first)
    assert second.layouts[0] is first.layouts[0]
    assert second.layouts[1] == layouts[1]
    assert shards_of({0: views[0]}, first).layouts.keys() == {0}
