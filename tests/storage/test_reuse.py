"""What is not written again: only the same bytes, only where they really lie, and never at a cost above the gain."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.storage import image, reuse
from ckptd.storage.image import TensorSpec
from ckptd.storage.manifest import Place
from ckptd.storage.reuse import NO_HISTORY, Content, Entry, decide, doubtful, history_of, kind, size_bytes
from ckptd.types import Piece, TensorSpan


def content_of(dtype: str, size: int, digest: str) -> Content:
    """The content of a tensor."""
    return digest + kind(dtype, size)


_CONTENTS = st.builds(content_of, st.just("F32"), st.sampled_from([10, 100, 1000]), st.sampled_from("abcd"))
_PLACES = st.builds(Place, st.sampled_from(["f1", "f2"]), st.integers(0, 9), st.integers(10, 5000))


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.builds(Entry, st.integers(0, 3), st.sampled_from("uvwx")), _CONTENTS),
    st.dictionaries(_CONTENTS, _PLACES),
    st.dictionaries(st.sampled_from(["f1", "f2"]), st.integers(1, 20_000)),
)
def test_every_reference_is_sound(
    contents: dict[Entry, Content], earlier: dict[Content, Place], file_bytes: dict[str, int]
) -> None:
    """Whatever there is: a reference leads to the same content, to an owner that writes it, within both rules."""
    image_bytes = {rank: 1 + sum(size_bytes(c) for e, c in contents.items() if e.rank == rank) for rank in range(4)}
    targets = decide(contents, earlier, file_bytes, image_bytes)
    used: dict[str | None, set[Place]] = defaultdict(set)
    saved: dict[int, int] = defaultdict(int)
    for entry, target in targets.items():
        saved[entry.rank] += size_bytes(contents[entry])
        if isinstance(target, Place):
            assert earlier[contents[entry]] == target
            used[target.file].add(target)
        else:
            assert contents[target] == contents[entry]
            assert target.rank < entry.rank
            assert target not in targets, "a reference to a reference"
    for file, places in used.items():
        share = sum(place.end - place.begin for place in places) / file_bytes[str(file)]
        assert share >= reuse.MIN_REFERRED_SHARE
    assert all(size >= reuse.MIN_SAVED_SHARE * image_bytes[rank] for rank, size in saved.items())


def test_small_leftovers_keep_no_file_alive() -> None:
    """An earlier file of which little is still needed is not referred to, and one of which much is needed is."""
    entry, content = Entry(0, "t"), content_of("F32", 24, "a")
    place = Place("old", 100, 124)
    assert decide({entry: content}, {content: place}, {"old": 96}, {0: 100}) == {entry: place}
    assert decide({entry: content}, {content: place}, {"old": 97}, {0: 100}) == {}
    assert decide({entry: content}, {content: place}, {}, {0: 100}) == {}


def test_a_small_gain_is_not_worth_a_file_put_together() -> None:
    """A rank that would save little writes its image; others that gain more still refer, to it as well."""
    same = content_of("F32", 10, "a")
    contents = {Entry(rank, "t"): same for rank in range(3)}
    targets = decide(contents, {}, {}, {0: 10, 1: 1000, 2: 100})
    assert targets == {Entry(2, "t"): Entry(0, "t")}


def test_other_dtypes_are_other_contents() -> None:
    """The same digest of another dtype or size is no match."""
    place = Place("old", 0, 100)
    earlier = {content_of("F32", 100, "a"): place}
    for content in (content_of("I32", 100, "a"), content_of("F32", 96, "a"), content_of("F32", 100, "b")):
        assert decide({Entry(0, "t"): content}, earlier, {"old": 100}, {0: 100}) == {}


def entries(*ranks: list[TensorSpec]) -> dict[Entry, TensorSpan]:
    """What is in some ranks' images."""
    return {
        Entry(rank, span.name): span for rank, specs in enumerate(ranks) for span in image.plan(specs, 10, {}).spans
    }


def test_prediction_without_a_history() -> None:
    """Doubtful is what an earlier checkpoint has one of the same size of, and what ranks keep under one name."""
    spec = [TensorSpec("a", "F32", (25,)), TensorSpec("b", "F32", (3,)), TensorSpec("none", "F32", (0,))]
    parts = [TensorSpec("p", "F32", (4,), Piece("p", (8,), (offset,))) for offset in (0, 4)]
    assert set(doubtful(entries(spec), set(), NO_HISTORY)) == set()
    assert set(doubtful(entries(spec), {content_of("F32", 100, "x")}, NO_HISTORY)) == {Entry(0, "a")}
    both = entries([*spec, parts[0]], [spec[0], parts[1]])
    assert set(doubtful(both, set(), NO_HISTORY)) == {Entry(0, "a"), Entry(1, "a")}


def test_prediction_from_the_last_time() -> None:
    """What was repeated the last time is doubtful, what was not is presumed changed; values are always written."""
    specs = {name: TensorSpec(name, "F32", (25,)) for name in ("moved", "still", "grown", "new")}
    before = entries([specs["moved"], specs["still"], TensorSpec("grown", "F32", (24,))])
    seen = {"moved": (100, "y"), "still": (100, "x"), "grown": (96, "z")}
    earlier = {content_of("F32", 100, "x")}
    history = history_of(before, {Entry(0, name): content_of("F32", *found) for name, found in seen.items()}, earlier)
    assert set(history.repeated) == {Entry(0, "still")}
    now = entries(list(specs.values()))
    assert set(doubtful(now, earlier, history)) == {Entry(0, name) for name in ("still", "grown", "new")}
    assert (
        set(doubtful(before, earlier, history)) == set(doubtful(dict(before), earlier, history)) == {Entry(0, "still")}
    )


def test_what_ranks_have_alike_is_repeated() -> None:
    """What two ranks have is repeated in both, also when no earlier checkpoint has it; twice in one rank is not."""
    alike, twice, own = (content_of("F32", 100, digest) for digest in "abc")
    contents = {
        Entry(0, "t"): alike,
        Entry(0, "u"): twice,
        Entry(0, "v"): twice,
        Entry(1, "t"): alike,
        Entry(1, "u"): own,
    }
    history = history_of({}, contents, {content_of("F32", 100, "gone")})
    assert set(history.repeated) == {Entry(0, "t"), Entry(1, "t")}


def test_nothing_is_learnt_from_a_first_time() -> None:
    """Without an earlier checkpoint nothing can have been repeated, and that says nothing about the next time."""
    assert history_of({}, {Entry(0, "t"): content_of("F32", 4, "a")}, set()) == NO_HISTORY
