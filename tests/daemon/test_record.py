"""What is written down of a job: when it comes back, and that a full state folder stops nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import structlog

from ckptd.config import JobConfig
from ckptd.core.job_states import JobState
from ckptd.daemon.record import Record, returns
from ckptd.journal import Journal, Life
from ckptd.store_config import read_stores

RUNNING, DRAINING, STOPPING = JobState.RUNNING, JobState.DRAINING, JobState.STOPPING
STOPPED, FAILED, FINISHED = JobState.STOPPED, JobState.FAILED, JobState.FINISHED


@pytest.mark.parametrize(
    ("state", "stopped", "left", "back"),
    [
        (RUNNING, False, None, True),  # its agent may be killed at any moment
        (STOPPING, False, RUNNING, True),  # the service is stopped
        (STOPPED, False, RUNNING, True),
        (FAILED, False, RUNNING, True),  # its last snapshot could not be made durable: an older one is
        (STOPPED, False, DRAINING, True),  # it has finished, but an upload has not
        (FAILED, False, DRAINING, False),  # it was given up before
        (FINISHED, False, DRAINING, False),
        (FINISHED, False, RUNNING, False),
        (STOPPED, False, None, False),  # by its own time limit
        (FAILED, False, None, False),
        (RUNNING, True, None, True),  # `ckptctl stop` is under way, and is to come to its end
        (STOPPED, True, None, False),
        (STOPPED, True, RUNNING, False),
    ],
)
def test_when_a_job_comes_back(state: JobState, stopped: bool, left: JobState | None, back: bool) -> None:
    """What its service has ended comes back, what has ended by itself or was stopped does not."""
    assert returns(state, stopped=stopped, left=left) is back


def test_a_full_state_folder_stops_nothing(tmp_path: Path) -> None:
    """A job whose journal can't be written goes on; that is said once."""
    journal = Journal(tmp_path)
    config = JobConfig("gpt", ("train.py",), read_stores(str(tmp_path), 3))
    with structlog.testing.capture_logs() as logs:
        record = Record(journal, config, 7, "socket", structlog.get_logger())
        assert record.due
        record.write({"state": "running"}, Life(comes_back=True))
        assert not record.due
        record.urgent = True
        assert record.due
        found = journal.read_job("gpt")
        assert found is not None
        assert (found.agent_pid, found.agent_socket, found.life.comes_back) == (7, "socket", True)
        journal.close()
        for _ in range(3):
            record.write({"state": "running"}, Life())
    assert [item["event"] for item in logs] == ["journal failed"]
