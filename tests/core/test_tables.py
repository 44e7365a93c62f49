"""The transition tables: complete, without traps, and the same as what the README shows."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import pytest

from ckptd.core import job_states, snapshots
from ckptd.core.job_states import JOB_TABLE, TERMINAL, JobEvent, JobState
from ckptd.core.snapshots import SNAPSHOT_TABLE, SnapshotEvent, SnapshotState
from ckptd.core.table import TransitionTable
from ckptd.errors import InvariantError

README = Path(job_states.__file__).with_name("README.md")

TABLES = [
    pytest.param(JOB_TABLE, JobState.PENDING, TERMINAL, JobEvent, id="job"),
    pytest.param(
        SNAPSHOT_TABLE, SnapshotState.ANNOUNCED,
        {SnapshotState.DISPUTED, SnapshotState.VOID, SnapshotState.SUPERSEDED}, SnapshotEvent,
        id="snapshot",
    ),
]  # fmt: skip


def reachable(table, first):
    """Return every state to which events lead from `first`."""
    found, new = set(), {first}
    while new:
        found |= new
        new = {after for state in new for after in table.table[state].values()} - found
    return found


@pytest.mark.parametrize(("table", "first", "terminal", "events"), TABLES)
def test_every_state_is_reachable_and_every_event_used(table, first, terminal, events):
    """Proves that the table has a row for each state, that each can be reached, and that no event is left over."""
    assert set(table.table) == set(type(first))
    assert reachable(table, first) == set(type(first))
    assert {event for moves in table.table.values() for event in moves} == set(events)


@pytest.mark.parametrize(("table", "first", "terminal", "events"), TABLES)
def test_terminal_states_have_no_way_out_and_all_others_an_end(table, first, terminal, events):
    """Proves that the end is the end, and that no state is a trap from which it can't be reached."""
    for state in type(first):
        assert bool(table.table[state]) == (state not in terminal)
        assert reachable(table, state) & set(terminal)


def test_a_job_can_be_stopped_in_every_state_that_goes_on():
    """Proves that a stop is never illegal while a job could still train."""
    for state in set(JobState) - TERMINAL - {JobState.STOPPING, JobState.DRAINING}:
        assert JOB_TABLE.allows(state, JobEvent.STOP)


def test_an_illegal_event_is_a_bug_and_says_which():
    """Proves that what the table does not know crashes, with the event and the state in the message."""
    with pytest.raises(InvariantError, match="job: claimed is illegal while running"):
        JOB_TABLE.next(JobState.RUNNING, JobEvent.CLAIMED)
    with pytest.raises(InvariantError, match="snapshot: commit is illegal while announced"):
        SNAPSHOT_TABLE.next(SnapshotState.ANNOUNCED, SnapshotEvent.COMMIT)


def test_the_description_has_a_line_for_every_move():
    """Proves the text form of a table on a small one."""

    class Light(Enum):
        RED = "red"
        GREEN = "green"

    class Turn(Enum):
        GO = "go"
        HALT = "halt"

    table = TransitionTable("light", {Light.RED: {Turn.GO: Light.GREEN}, Light.GREEN: {Turn.HALT: Light.RED}})
    assert table.describe() == "red --go--> green\ngreen --halt--> red"
    assert table.allows(Light.RED, Turn.GO)
    assert not table.allows(Light.RED, Turn.HALT)


@pytest.mark.parametrize("table", [JOB_TABLE, snapshots.SNAPSHOT_TABLE], ids=["job", "snapshot"])
def test_the_readme_shows_the_table(table):
    """Proves that the picture which people read is the table which the machine obeys."""
    assert table.describe() in README.read_text()
