"""Which disk takes a shard: a pure choice, and what a tier remembers for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.storage.spreading import Load, Spread, choose

IDLE = Load(has_room=True, is_avoided=False, in_flight_bytes=0, folder_bytes=0)
_LOADS = st.builds(Load, st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 3))


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        ({0: replace(IDLE, in_flight_bytes=1), 1: IDLE}, 1),
        ({0: replace(IDLE, folder_bytes=1), 1: IDLE}, 1),
        ({0: replace(IDLE, in_flight_bytes=1), 1: replace(IDLE, folder_bytes=9)}, 1),
        ({0: replace(IDLE, has_room=False), 1: replace(IDLE, in_flight_bytes=9)}, 1),
        ({0: replace(IDLE, is_avoided=True), 1: replace(IDLE, in_flight_bytes=9)}, 1),
        ({0: replace(IDLE, has_room=False), 1: replace(IDLE, is_avoided=True)}, 1),
        ({0: replace(IDLE, has_room=False)}, 0),
        ({2: IDLE, 5: IDLE}, 2),
    ],
)
def test_choice(loads: dict[int, Load], chosen: int) -> None:
    """Room comes first, then not to have failed, then what is in flight, then what the checkpoint has there."""
    assert choose(loads, 0) == chosen


@given(st.dictionaries(st.integers(0, 7), _LOADS, min_size=1), st.integers(0, 100))
def test_the_choice_is_the_best(loads: dict[int, Load], turn: int) -> None:
    """One of the disks is chosen, and no other one is better in what comes first."""
    chosen = loads[choose(loads, turn)]
    assert not any(
        (not load.has_room, load.is_avoided, load.in_flight_bytes, load.folder_bytes)
        < (not chosen.has_room, chosen.is_avoided, chosen.in_flight_bytes, chosen.folder_bytes)
        for load in loads.values()
    )


@given(st.integers(1, 8), st.integers(0, 100))
def test_equals_take_turns(count: int, turn: int) -> None:
    """Of disks that are alike, each is chosen once in as many turns."""
    loads = dict.fromkeys(range(count), IDLE)
    assert sorted(choose(loads, turn + more) for more in range(count)) == list(range(count))


@given(st.integers(1, 6), st.integers(1, 5))
def test_shards_of_one_size_are_even(disks: int, rounds: int) -> None:
    """As many shards as disks, or a multiple, end the same number on each, whether at once or one after the other."""
    free = dict.fromkeys(range(disks), 2**40)
    for is_at_once in (True, False):
        spread, found, open_puts = Spread(disks), Counter[int](), []
        for rank in range(disks * rounds):
            put = spread.writing(f"job/g1/s1/{rank}", 1000, free)
            found[put.__enter__()] += 1
            if is_at_once:
                open_puts.append(put)
            else:
                put.__exit__(None, None, None)
        for put in open_puts:
            put.__exit__(None, None, None)
        assert set(found.values()) == {rounds}
        assert len(found) == disks


def test_what_failed_is_not_counted() -> None:
    """A put that fails leaves no load behind, and its disk is chosen last from then on."""
    spread, free = Spread(2), {0: 100, 1: 100}
    with pytest.raises(OSError, match="no"), spread.writing("job/s1/a", 10, free) as first:
        raise OSError("no")
    spread.failed(first)
    for key in ("job/s1/b", "job/s1/c"):
        with spread.writing(key, 10, free) as at:
            assert at != first


def test_memory_is_bounded() -> None:
    """However many keys and checkpoints pass, little of them is remembered, the newest of it."""
    spread = Spread(2)
    for number in range(10_000):
        with spread.writing(f"job/s{number}/a", 1, {1: 100}):
            pass
    assert (len(spread._places), len(spread._folders)) == (4096, 8)
    assert spread.look_order("job/s9999/a") == [1, 0]
    assert spread.look_order("job/s0/a") == [0, 1]
    spread.gone("job/s9999/a")
    assert spread.look_order("job/s9999/a") == [0, 1]
