"""Whatever is said to an agent, in whatever order and by how many at once: it answers or refuses, and lives."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.core.events import Progress
from ckptd.daemon.ranks import Rank
from ckptd.errors import CkptdError
from ckptd.protocol import messages as m
from ckptd.protocol.page import PAGE_BYTES, Word
from tests.daemon.harness import PATIENCE_S, AgentThread, Node, until
from tests.daemon.speaker import Speaker

_few = partial(settings, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

WORD = st.integers(0, 4) | st.integers(-(2**63), 2**64 - 1) | st.integers(-(10**30), 10**30)
NUMBER = st.floats(allow_nan=False, allow_infinity=False) | st.just(math.pi) | st.just(10**308)
TEXT = st.sampled_from(
    ["", "job", "a/b", "../x", "\0", "\ud800", "\udc80", "5s", "s3://x/y", "file:\0", "off"]
) | st.text(max_size=5)
JUNK = st.recursive(
    st.none() | st.booleans() | WORD | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
OBJECT = st.dictionaries(st.sampled_from(["code", "message", "type", "traceback", "error", "x"]), JUNK, max_size=5)
SEAL = st.builds(
    m.Seal,
    WORD,
    st.integers(-1, 3),
    WORD,
    NUMBER,
    st.dictionaries(st.text(max_size=3), NUMBER),
    st.booleans(),
    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
)
SLOT = st.fixed_dictionaries(
    {"slot": st.integers(-1, 2) | JUNK, "seal": JUNK | SEAL.map(lambda seal: dict(vars(seal)))}
)
JOIN = st.builds(
    m.Join,
    st.sampled_from(["job", "a/b"]),
    st.integers(-1, 2),
    st.sampled_from([-1, 1, 2, 2, 10**9]),
    st.integers(0, 2),
)
RANKS = st.one_of(
    JOIN,
    st.builds(m.Reserve, WORD.filter(lambda size: size < 2**24)),
    st.builds(m.Open, st.lists(TEXT, max_size=3) | st.just(["x"] * 65)),
    st.builds(m.Restored, WORD, WORD, NUMBER),
    st.builds(m.RestoreFailed, WORD, WORD, OBJECT),
    st.builds(m.Stepped, WORD, NUMBER),
    SEAL,
    st.builds(m.Missed, WORD, WORD, st.none() | OBJECT),
    st.builds(m.Imported, st.lists(TEXT, max_size=2)),
    st.builds(m.Request, WORD),
    st.builds(m.Leave, WORD),
    st.builds(m.Raised, st.sampled_from(["job", "other"]), WORD, WORD, OBJECT),
    st.builds(m.Exited, WORD, WORD, WORD, NUMBER),
    st.builds(m.Returned, st.just("job"), TEXT, WORD, WORD, st.just([{"rank": 0}])),
    st.builds(m.Status, st.none() | st.just("job")),
    st.builds(m.Hello, st.just("rank"), WORD),
)
WISHES = st.dictionaries(
    st.sampled_from(["grace", "no_checkpoint", "after_step", "at", "at_next_checkpoint", "clear"]),
    JUNK | st.just(1),
    max_size=2,
)
FAULT = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["kill", "exception", "nan", "slow", "full-disk", "launcher"]),
        "ranks": st.lists(st.integers(-1, 2), max_size=2) | JUNK,
        "step": st.none() | WORD | JUNK,
        "signal": st.sampled_from([0, signal.SIGRTMIN + 1, 99, -9]),
        "for_s": NUMBER | JUNK,
        "pause_s": NUMBER | JUNK,
    }
)
SETTING = st.sampled_from(
    ["every_s", "keep_last", "max_restarts", "restart_window_s", "preload", "python", "cwd", "env", "slots", "store",
     "flush_max_bytes_per_s", "overlap", "resume_from", "resume_step", "agent_wait_s", "straggler", "numbers", "halt",
     "command", "name", "nproc", "x"]
)  # fmt: skip
ASKED = st.one_of(
    st.builds(m.Status, st.none() | TEXT),
    st.builds(
        m.Control,
        st.just("job") | TEXT,
        st.sampled_from(["checkpoint", "halt", "restart", "x"]),
        st.just(False),
        st.none() | WORD,
        WISHES,
    ),
    st.builds(m.Control, st.just("nosuch"), st.just("stop"), st.booleans(), st.none(), WISHES),
    st.builds(m.Fault, st.just("job"), FAULT | OBJECT),
    RANKS,
)


@pytest.fixture(autouse=True)
def _harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of these tests are the test's own process: nobody sends it a signal."""
    monkeypatch.setattr(Rank, "send_signal", lambda *_: None)


def tell(speaker: Speaker, message: m.Message) -> None:
    """Say something, if it can be said and somebody listens."""
    with contextlib.suppress(CkptdError):
        speaker.channel.send(message, PATIENCE_S)


def end_all(agent: AgentThread) -> None:
    """End every job."""
    jobs = list(agent.agent.jobs.values())
    agent.call(lambda: [job.stop(0.0, checkpoint=False) for job in jobs if not job.ended.done()])
    until(lambda: all(job.ended.done() for job in jobs), "the ends of all jobs")


def still_answers(node: Node, agent: AgentThread) -> None:
    """Fail unless the agent has handled what was said, and nothing of it has gone wrong."""
    ctl = Speaker(node, "ctl")
    with contextlib.suppress(CkptdError):  # what ranks report may be too much for a number
        ctl.ask(m.Status())
    assert isinstance(ctl.ask(m.Status("job")) if "job" in agent.agent.jobs else m.Done(), m.Done)
    ctl.close()
    assert not agent.failures


@_few(max_examples=20)
@given(said=st.lists(RANKS, max_size=12), step=st.integers(0, 3) | st.integers(0, 2**64 - 1))
def test_no_rank_crashes_the_agent(node: Node, agent: AgentThread, said: list[m.Message], step: int) -> None:
    """Whatever a rank of our own version says or writes into its page is handled or refused, in whatever order."""
    speaker = Speaker(node)
    name = f"job-{agent.call(lambda: len(agent.agent.jobs))}"
    admitted = speaker.join(name, every_s=0.001)
    assert (admitted.generation, admitted.offer) == (1, None)
    assert speaker.page is not None
    for message in said:
        tell(speaker, message)
        for later in (step, min(step + 1, 2**64 - 1)):  # two looks: the first teaches the agent the pace
            speaker.page.words[Word.STEP] = later
            agent.call(lambda later=later: agent.job(name).feed(Progress({0: later})))
    speaker.close()
    still_answers(node, agent)


PLACES = st.tuples(st.integers(0, 2), st.sampled_from(["rank", "ctl"]))


@_few(max_examples=15)
@given(
    data=st.data(),
    said=st.lists(
        st.tuples(PLACES, st.sampled_from(["say", "say", "say", "hang up", "scribble", "come back"])), max_size=15
    ),
)
def test_several_at_once_do_not_either(
    node: Node, agent: AgentThread, data: st.DataObject, said: list[tuple[tuple[int, str], str]]
) -> None:
    """Ranks and `ckptctl` that speak in turns, hang up, scribble and hand back anything leave an agent that answers."""
    speakers: dict[tuple[int, str], Speaker] = {}
    with contextlib.ExitStack() as stack:
        for place, what in said:
            if place not in speakers:
                speakers[place] = begin(node, *place)
                stack.callback(speakers[place].close)
            match what:
                case "say":
                    tell(speakers[place], data.draw(ASKED if place[1] == "ctl" else RANKS))
                case "hang up":
                    speakers.pop(place).close()
                case "scribble":
                    scribble(agent, data)
                case "come back":
                    come_back(agent, speakers[place], data)
    still_answers(node, agent)
    end_all(agent)
    still_answers(node, agent)


def begin(node: Node, number: int, role: str) -> Speaker:
    """Return a connection, that of a rank with its place or without."""
    speaker = Speaker(node, role)
    if role == "rank":
        options = {"store": str(node.store), "every_s": 0.001, "chaos": True, "hang": False}
        tell(speaker, m.Join("job", number % 2, 2, 0, options))
    return speaker


def scribble(agent: AgentThread, data: st.DataObject) -> None:
    """Write anything into a word that ranks write, of every control page; let the agent look at them."""
    number = data.draw(st.integers(Word.STEP, Word.SLOT_RELEASED - 1) | st.integers(Word.HARMED, PAGE_BYTES // 8 - 1))
    value = data.draw(st.integers(0, 3) | st.integers(0, 2**64 - 1))

    def write() -> None:
        for job in agent.agent.jobs.values():
            for rank in job.attendance.admitted.values():
                if rank.page is not None:
                    rank.page.words[number] = value
            if not job.ended.done():
                job.attendance.look_at_pages()
                job._watcher.look()

    agent.call(write)


SIZES = st.lists(st.sampled_from([0, PAGE_BYTES, 5000]), max_size=2)


def come_back(agent: AgentThread, speaker: Speaker, data: st.DataObject) -> None:
    """Hand anything back: a control page as it should be or not, and memory that may be slots."""
    generation, rank, step = data.draw(st.integers(0, 3)), data.draw(st.integers(-1, 2)), data.draw(WORD)
    slots, sizes, like_page = data.draw(st.lists(SLOT, max_size=2)), data.draw(SIZES), data.draw(st.booleans())

    def content() -> tuple[str, bytes]:
        job = agent.agent.jobs.get("job")
        pages = [] if job is None else [rank.page for rank in job.attendance.admitted.values() if rank.page is not None]
        return "" if job is None else job.incarnation, pages[0].words.tobytes() if pages and like_page else b""

    incarnation, page = agent.call(content)
    memory = [os.memfd_create("memory", os.MFD_CLOEXEC) for _ in (page, *sizes)]
    os.write(memory[0], page)
    for descriptor, size in zip(memory[1:], sizes, strict=True):
        os.truncate(descriptor, size)
    with contextlib.suppress(CkptdError):
        said = m.Rejoin("job", rank, generation, incarnation, step, True, like_page, slots)
        speaker.channel.send_with(said, memory, PATIENCE_S)
    for descriptor in memory:
        os.close(descriptor)


@_few(max_examples=25)
@given(changes=st.dictionaries(SETTING, JUNK | st.just([{"url": "x", "options": {"a": "\0"}}]), min_size=1, max_size=2))
def test_no_setting_crashes_the_agent(node: Node, agent: AgentThread, changes: dict[str, Any]) -> None:
    """Whatever is submitted is refused, or begins and can be ended."""
    store, python = str(node.folder / "store"), "/bin/false"
    usual = {"store": store, "command": ["-c", "pass"], "preload": [], "python": python, "cwd": str(node.folder)}
    ctl = Speaker(node, "ctl")
    tell(ctl, m.Submit({"name": "sup", "max_restarts": 0, **usual, **changes}))
    still_answers(node, agent)
    end_all(agent)
    ctl.close()
    still_answers(node, agent)
