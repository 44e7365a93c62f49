"""The control page: who owns which word, and slots that are free exactly when they may be written."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.protocol import page as p
from ckptd.protocol.page import MAX_SLOTS, NEVER, ControlPage, Phase, Word

_AGENT_WORDS = {
    Word.MAGIC,
    Word.VERSION,
    Word.CAPTURE_STEP,
    Word.WHOLE,
    Word.AGENT_NS,
    Word.HARM_ALLOWED,
    Word.LAST_STEP,
    Word.LEAVE,
    *range(Word.HARM, Word.HARM_PAUSE_MS + 1),
    *range(Word.SLOT_RELEASED, Word.SLOT_RELEASED + MAX_SLOTS),
}
_RANK_WORDS = {
    Word.STEP,
    Word.BEAT_NS,
    Word.PHASE,
    Word.SECTION_UNTIL_NS,
    Word.WAITED_NS,
    Word.REPORTS,
    Word.HARMED,
    Word.HARMLESS,
    *range(Word.SECTION, Word.SECTION + p.SECTION_WORDS),
    *range(Word.SLOT_SEALED, Word.SLOT_SEALED + MAX_SLOTS),
    *range(Word.RING, Word.RING + 2 * p.RING_ENTRIES),
}


def new_pages(count: int) -> tuple[int, list[ControlPage]]:
    """A page mapped `count` times, as agent and rank have it, and its descriptor."""
    descriptor = os.memfd_create("test-page", os.MFD_CLOEXEC)
    os.posix_fallocate(descriptor, 0, p.PAGE_BYTES)
    return descriptor, [ControlPage(descriptor) for _ in range(count)]


@pytest.fixture
def sides() -> Iterator[tuple[ControlPage, ControlPage]]:
    """One page as the agent and as the rank see it."""
    descriptor, (agent, rank) = new_pages(2)
    os.close(descriptor)
    yield agent, rank
    agent.close()
    rank.close()


def test_no_word_has_two_owners() -> None:
    """The words of agent and rank don't overlap and lie within the page: each has exactly one writer."""
    assert not _AGENT_WORDS & _RANK_WORDS
    assert max(_AGENT_WORDS | _RANK_WORDS) < p.PAGE_BYTES // 8
    assert set(Word) <= _AGENT_WORDS | _RANK_WORDS


def test_each_side_writes_only_its_own_words(sides: tuple[ControlPage, ControlPage]) -> None:
    """The agent's calls change only the agent's words, and the rank's calls only the rank's."""
    agent, rank = sides
    agent.format()
    before = list(rank.words)
    assert {at for at, word in enumerate(before) if word} <= _AGENT_WORDS
    rank.seal(0)
    rank.seal(MAX_SLOTS - 1)
    after = list(agent.words)
    assert {at for at in range(len(after)) if after[at] != before[at]} <= _RANK_WORDS
    agent.announce(7)
    agent.release(0)
    last = list(rank.words)
    assert {at for at in range(len(last)) if last[at] != after[at]} <= _AGENT_WORDS


def test_what_one_side_writes_the_other_reads(sides: tuple[ControlPage, ControlPage]) -> None:
    """Both mappings are the same memory: no call, no message, no delay."""
    agent, rank = sides
    agent.format()
    agent.announce(42)
    assert rank.words[Word.CAPTURE_STEP] == 42
    rank.words[Word.STEP] = 41
    rank.words[Word.BEAT_NS] = 2**62
    rank.words[Word.PHASE] = Phase.CAPTURING
    assert (agent.words[Word.STEP], agent.words[Word.BEAT_NS], agent.phase) == (41, 2**62, Phase.CAPTURING)
    agent.announce(None)
    assert rank.words[Word.CAPTURE_STEP] == NEVER


def test_another_process_sees_the_page() -> None:
    """A process that gets the descriptor, as a rank does, shares the page and leaves its words behind when it dies."""
    descriptor, (agent,) = new_pages(1)
    agent.format()
    code = f"""
import os, signal
from ckptd.protocol.page import ControlPage, Word
page = ControlPage({descriptor})
assert page.valid
page.words[Word.STEP] = 99
page.seal(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    try:
        done = subprocess.run([sys.executable, "-c", code], check=False, pass_fds=[descriptor])
        assert done.returncode == -9
        assert agent.words[Word.STEP] == 99
        assert [agent.slot_free(slot) for slot in range(3)] == [True, False, True]
    finally:
        agent.close()
        os.close(descriptor)


def test_only_a_formatted_page_is_valid(sides: tuple[ControlPage, ControlPage]) -> None:
    """A page of zeros, of another magic or of another layout version is not taken for one of ours."""
    agent, rank = sides
    assert not rank.valid
    agent.format()
    assert rank.valid
    agent.words[Word.VERSION] = p.PAGE_VERSION + 1
    assert not rank.valid
    agent.format()
    agent.words[Word.MAGIC] = 0
    assert not rank.valid


def test_a_new_page_wants_nothing(sides: tuple[ControlPage, ControlPage]) -> None:
    """No capture is announced, the rank is joining, and every slot is free."""
    agent, rank = sides
    agent.format()
    assert rank.words[Word.CAPTURE_STEP] == NEVER
    assert rank.phase is Phase.JOINING
    assert all(rank.slot_free(slot) for slot in range(MAX_SLOTS))


def test_held_slots_begin_sealed(sides: tuple[ControlPage, ControlPage]) -> None:
    """A slot that holds a snapshot of the generation before is not free until the agent lets go of it."""
    agent, rank = sides
    agent.format(held=(0, 2, MAX_SLOTS - 1))
    assert [slot for slot in range(MAX_SLOTS) if not rank.slot_free(slot)] == [0, 2, MAX_SLOTS - 1]
    agent.release(2)
    assert rank.slot_free(2)
    assert not rank.slot_free(0)


@pytest.mark.parametrize("number", [6, 99, 2**64 - 1])
def test_an_unknown_phase_reads_as_training(sides: tuple[ControlPage, ControlPage], number: int) -> None:
    """A newer client may know more phases; to an older agent it is simply at work."""
    agent, rank = sides
    rank.words[Word.PHASE] = number
    assert agent.phase is Phase.TRAINING


@pytest.mark.parametrize("phase", list(Phase))
def test_every_phase_is_read(sides: tuple[ControlPage, ControlPage], phase: Phase) -> None:
    """What a rank writes is what the agent reads."""
    agent, rank = sides
    rank.words[Word.PHASE] = phase
    assert agent.phase is phase


def test_closing_unmaps() -> None:
    """A closed page holds nothing of the memory, and its descriptor could have been closed long before."""
    descriptor, (page,) = new_pages(1)
    os.close(descriptor)
    page.format()
    page.close()
    with pytest.raises(ValueError, match="released"):
        page.words[0]


@settings(max_examples=100, deadline=None)
@given(
    st.sets(st.integers(0, 3)),
    st.lists(st.tuples(st.sampled_from(["seal", "release"]), st.integers(0, 3)), max_size=40),
)
def test_slots_under_random_sequences(held: set[int], calls: list[tuple[str, int]]) -> None:
    """Whatever is sealed and released in whatever order, a slot is free if and only if a model says so.

    The rank seals only what is free, as it must; the agent may release what is free already, and that changes nothing.
    """
    memory = mmap.mmap(-1, p.PAGE_BYTES)
    page = ControlPage.__new__(ControlPage)
    page.words = memoryview(memory).cast("Q")
    page.format(held)
    busy = set(held)
    for call, slot in calls:
        if call == "seal" and slot not in busy:
            page.seal(slot)
            busy.add(slot)
        elif call == "release":
            page.release(slot)
            busy.discard(slot)
        assert {number for number in range(4) if not page.slot_free(number)} == busy
    assert all(page.slot_free(slot) for slot in range(4, MAX_SLOTS))
    page.words.release()
