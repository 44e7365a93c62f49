"""Who is to blame for a job that stands still: tables of stacks that were captured from real ranks, and properties."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.policy.activities import Doing, Frame, Look, activity
from ckptd.core.policy.findings import judge

STACKS = Path(__file__).parent / "stacks"
IN_BACKWARD = (
    Frame("_engine_run_backward", "/venv/lib/python3.11/site-packages/torch/autograd/graph.py", 979),
    Frame("train", "/home/user/train.py", 20, "loss.backward()"),
)
IN_BARRIER = (
    Frame("barrier", "/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", 5356, "work.wait()"),
    Frame("train", "/home/user/train.py", 30, "dist.barrier()"),
)


def captured(name: str) -> list[Look]:
    """Return the looks of a captured case."""
    found = json.loads((STACKS / f"{name}.json").read_text())
    return [Look(**{**item, "stack": tuple(Frame(*frame) for frame in item["stack"])}) for item in found]


def waits(rank: int, stack: tuple[Frame, ...] = IN_BACKWARD, step: int | None = 7) -> Look:
    """Return the look of a rank that waits for the others."""
    return Look(rank, 100 + rank, "S", 0.0, "futex_do_wait", stack, step=step)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sleep", "sleeps, in other (train.py:40: time.sleep(1000))"),
        ("python_loop", "is busy ("),
        ("c_loop", "and holds the GIL), in other (train.py:45: re.match("),
        ("lock", "waits for a lock, in other (train.py:49: lock.acquire())"),
        ("loader", "sleeps inside its data loader, in Stuck.__getitem__ (train.py:23: time.sleep(1000))"),
        ("worker_loader", "waits for its data loader, in other (train.py:53"),
        ("stopped", "is stopped by a signal (SIGSTOP or SIGTSTP)"),
        ("socket", "waits for a socket, in other"),
        ("child", "waits for a program that it started, in other"),
        ("pipe", "waits for another process, in other"),
        ("handle", "sleeps, in other"),
    ],
)
def test_the_rank_that_does_something_else_is_to_blame(name: str, words: str) -> None:
    """Of two real ranks the one that the other waits for is named, with what it does and where."""
    looks = captured(name)
    found = judge(looks)
    assert found.culprit == 1, found
    assert words in found.lines[1]
    assert found.reason.startswith("rank 1 ")
    assert activity(looks[0]).doing is Doing.WAITING, found.lines[0]


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("barrier", "waits in backward", "waits in barrier"), ("other_collective", "waits in all_", "waits in broadcast")],
)
def test_different_collectives_are_said_and_nobody_is_blamed(name: str, first: str, second: str) -> None:
    """Two real ranks that wait for each other in different collectives are both shown; which is wrong nobody knows."""
    found = judge(captured(name))
    assert found.culprit is None
    assert found.lines[0].startswith(first)
    assert found.lines[1].startswith(second)
    assert "different collectives" in found.reason


@pytest.mark.parametrize(
    ("looks", "culprit", "words"),
    [
        ([waits(0), Look(1, 5, "")], 1, "has ended"),
        ([waits(0), Look(1, 5, "Z")], 1, "has ended"),
        ([Look(0, 5, "T"), waits(1)], 0, "is stopped by a signal"),
        ([Look(0, 5, "t"), waits(1)], 0, "debugger"),
        ([waits(0), Look(1, 5, "D", 0.0, "nfs_wait")], 1, "blocked inside the kernel (nfs_wait)"),
        ([waits(0), Look(1, 5, "R", 1.0)], 1, "is busy (100% of the time); its stack could not be read"),
        ([waits(0), Look(1, 5, "S", 0.0, "hrtimer_nanosleep")], 1, "sleeps; its stack could not be read"),
        ([waits(0), Look(1, 5, "S", 0.0, "futex_do_wait")], 1, "waits for something in the kernel's futex_do_wait"),
        ([waits(0), waits(1, IN_BARRIER), waits(2)], 1, "the others in something else"),
        ([waits(0, step=8), waits(1, step=7)], 1, "is behind the others"),
        ([waits(0), waits(1)], None, "nothing tells them apart"),
        ([Look(0, 5, "S", 0.0, "futex_do_wait"), Look(1, 6, "S", 0.0, "futex_do_wait")], None, "nothing tells"),
        ([Look(0, 5, "R", 1.0), Look(1, 6, "S", 0.0, "hrtimer_nanosleep")], None, "something of its own"),
        ([Look(0, 5, "S", 0.0, "hrtimer_nanosleep")], 0, "sleeps"),
        ([waits(0)], 0, "waits in backward"),
        ([], None, "no rank was there"),
    ],
)
def test_signs(looks: list[Look], culprit: int | None, words: str) -> None:
    """Each sign of a fault has its words, and weighs as much as it says."""
    found = judge(looks)
    assert found.culprit == culprit, found
    assert words in found.reason


def test_what_waits_for_its_device_waits() -> None:
    """A rank that waits for its GPU waits for whatever hangs there, and is not to blame beside one that sleeps."""
    item = (Frame("train", "/home/user/train.py", 9, "total += loss.item()"),)
    sync = (Frame("synchronize", "/venv/lib/python3.11/site-packages/torch/cuda/__init__.py", 7), *item)
    for stack in (item, sync):
        look = Look(0, 5, "R", 1.0, "", stack, step=3)
        assert activity(look).words.startswith("waits in its device")
        assert judge([look, dataclasses.replace(captured("sleep")[1], rank=1)]).culprit == 1


def test_one_that_computes_while_another_reads_a_socket_is_to_blame() -> None:
    """A rank in a socket of its own may wait for the one that is busy, and not the other way round."""
    reads = dataclasses.replace(captured("socket")[1], rank=0, step=8)
    found = judge([reads, Look(1, 6, "R", 1.0, step=8)])
    assert found.culprit == 1
    assert judge([reads, dataclasses.replace(reads, rank=1)]).culprit is None


frames = st.sampled_from([*IN_BACKWARD, *IN_BARRIER, *captured("socket")[1].stack, *captured("loader")[1].stack])
looks = st.builds(
    Look,
    rank=st.integers(0, 7),
    pid=st.integers(1, 10**6),
    state=st.sampled_from(["", "R", "S", "D", "T", "t", "Z", "I"]),
    busy=st.floats(0, 1),
    wchan=st.sampled_from(["", "futex_do_wait", "hrtimer_nanosleep", "pipe_read", "do_wait"]),
    stack=st.lists(frames, max_size=5).map(tuple),
    holds_gil=st.booleans(),
    step=st.none() | st.integers(0, 9),
)


@given(st.lists(looks, max_size=6, unique_by=lambda look: look.rank), st.randoms())
def test_every_rank_gets_its_line_and_order_does_not_matter(seen: list[Look], chance: object) -> None:
    """Whatever is seen, each rank has one line, the culprit is one of them, and the order of the looks is no matter."""
    found = judge(seen)
    assert set(found.lines) == {look.rank for look in seen}
    assert all(line and "\n" not in line for line in found.lines.values())
    assert found.culprit is None or found.culprit in found.lines
    assert found.reason
    shuffled = list(seen)
    chance.shuffle(shuffled)
    assert judge(shuffled) == found


@given(looks, st.integers(2, 6))
def test_ranks_that_all_do_the_same_are_not_blamed(look: Look, count: int) -> None:
    """Where living ranks can't be told apart, nobody is blamed."""
    if look.state in ("R", "S", "I"):
        assert judge([dataclasses.replace(look, rank=rank) for rank in range(count)]).culprit is None
