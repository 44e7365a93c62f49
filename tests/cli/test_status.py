"""`ckptctl status JOB`: what it says of jobs that train, have ended, or whose agent is gone."""

from __future__ import annotations

import os
from typing import Any

import pytest

from ckptd.cli.status import _tell, current
from ckptd.daemon.living import started
from ckptd.journal import JobEntry, Life


def status(**facts: Any) -> dict[str, Any]:
    """Return the status of a job that trains, but for what is given."""
    return {
        "job": "gpt",
        "state": "running",
        "generation": 2,
        "step": 50,
        "ranks": [{"rank": 0, "pid": 7, "state": "training", "step": 50, "section": None}],
        "last_committed": {"step": 40, "tier": "local"},
        "restarts": 1,
        "error": None,
        "hang": {"limit_s": 5.0, "rule": "the floor", "since_step_s": 0.02},
        "warnings": [],
        "halt": None,
        "scrub": {"last_at": None, "checked": 0, "mended": 0, "damaged": []},
        **facts,
    }


def told(incidents: int = 0, *, comes_back: bool = False, **facts: Any) -> list[str]:
    """Return the lines before the table of the ranks."""
    known = [{"number": 1 + item, "failed_at": 1e9, "cause": "rank 1 was killed " * 20} for item in range(incidents)]
    return _tell(status(**facts), known, comes_back=comes_back, width=80)


def test_a_job_that_trains() -> None:
    """Its restarts are counted in words, and nothing is said of what is not the matter."""
    assert told()[:6] == [
        "job         gpt",
        "state       running",
        "generation  2 (1 restart in this run)",
        "step        50",
        "last step   20 ms ago; hung after 5.00 s without one (the floor)",
        "committed   step 40 on local",
    ]
    assert "generation  2 (2 restarts in this run)" in told(restarts=2)
    assert not [line for line in told() if line.startswith(("incident", "It", "Warning"))]


def test_the_last_incident_is_named() -> None:
    """The last incident is there with the command that tells it whole, in as much as a line has room for."""
    (line,) = [line for line in told(3) if line.startswith("incident")]
    assert line.startswith("incident    `ckptctl incidents gpt 3`, 2001-09-")
    assert line.endswith("…")


def test_a_job_that_has_failed_says_why() -> None:
    """Why it has failed is there, though no rank had failed; what holds of jobs that train is not."""
    lines = told(state="failed", error="the last snapshot could not be\nmade durable", comes_back=False)
    assert "It has failed: the last snapshot could not be made durable" in lines
    assert not [line for line in lines if line.startswith(("last step", "stops", "stopped"))]


def test_the_hint_of_a_failure_has_a_line_of_its_own() -> None:
    """What to do stands apart from what has happened, and neither is wider than the terminal."""
    lines = told(state="failed", error=f"{'no room ' * 15}is left (hint: free some)")
    assert lines[-2:] == ["  hint: free some", ""]
    assert max(map(len, lines)) <= 80
    assert sum("no room" in line for line in lines) == 2


def test_a_run_without_a_generation_yet() -> None:
    """A run that waits for its node has neither generation nor step, and says when it is given up."""
    summary = "the node is not ready: disk: full"
    waits = {"kind": "not ready", "rank": None, "summary": summary, "since_s": 2.0}
    now = status(state="preparing", generation=0, step=0, restarts=0, warnings=[waits])
    lines = _tell(now, [], comes_back=False, check_wait_s=300.0)
    assert lines[2:4] == ["generation  none yet (0 restarts in this run)", "step        -"]
    assert f"Warning for 2.00 s: {summary}; after 300 s of this the job is given up (check_wait)" in lines


@pytest.mark.parametrize(
    ("warning", "line"),
    [
        (("not ready", "the node is not ready: disk: full"), "Warning for 2.00 s: the node is not ready: disk: full"),
        (("flush", "no space left"), "Warning for 2.00 s: flush: no space left"),
    ],
)
def test_warnings(warning: tuple[str, str], line: str) -> None:
    """Of what kind a warning is stands before it, unless its words say so; one of an agent that is gone is old."""
    shown = {"warnings": [{"kind": warning[0], "rank": None, "summary": warning[1], "since_s": 2.0}]}
    assert told(**shown)[-3:] == ["", line, ""]
    assert line not in told(state="interrupted", **shown)


def entry(began: int, comes_back: bool = True) -> JobEntry:
    """Return what the journal has of a job whose agent is gone, and whose rank 0 is this process."""
    ranks = [
        {"rank": 0, "pid": os.getpid(), "state": "training", "step": 50},
        {"rank": 1, "pid": None, "state": "absent", "step": None},
    ]
    life = Life(comes_back, ranks_started={"0": began})
    return JobEntry("gpt", {}, status(ranks=ranks), 1, "/nowhere", 0.0, life)


def test_ranks_that_outlive_their_agent_are_not_called_gone() -> None:
    """A rank whose process still runs is alive, one with the same number that began at another time is not."""
    for began, state, words in (
        (started(os.getpid()), "alive", "Its agent is gone; its ranks go on without it"),
        (1, "gone", "Its agent is gone; it comes back by itself when the service starts"),
    ):
        found = current(entry(began))
        assert found["state"] == "interrupted"
        assert [rank["state"] for rank in found["ranks"]] == [state, "gone"]
        assert any(line.startswith(words) for line in _tell(found, [], comes_back=True))
