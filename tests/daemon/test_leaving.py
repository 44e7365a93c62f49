"""The notice that a machine is about to be taken away, and what ranks of a spared agent inherit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.daemon.launcher import spare_no_more
from ckptd.errors import ConfigError
from ckptd.halt_config import HaltConfig

_BUSY_NODE = """
import asyncio, os, resource, sys
import structlog
from ckptd.daemon.leaving import until_notice

async def main():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    waiting = asyncio.create_task(until_notice("true", structlog.get_logger()))
    await asyncio.sleep(0.2)
    assert not waiting.done(), waiting
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(await waiting)

import ckptd.daemon.leaving as leaving
leaving._COMMAND_EVERY_S = 0.3
asyncio.run(main())
"""


def test_a_notice_that_can_not_be_looked_for_now_ends_nobody() -> None:
    """A command that a busy node can't start is said, and tried again: it is no notice, and no end of the agent."""
    done = subprocess.run(
        [sys.executable, "-c", _BUSY_NODE], capture_output=True, text=True, timeout=60, check=False, stdin=0
    )
    assert done.returncode == 0, done.stderr
    assert "Too many open files" in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "`true` ended with 0"


@pytest.mark.parametrize("notice", ["file:/run/a\0b", "a\0b", "file:", " "])
def test_what_can_be_no_notice_is_refused(notice: str) -> None:
    """What no file and no command can be called is refused before a job begins."""
    with pytest.raises(ConfigError, match="preempt_notice"):
        HaltConfig(preempt_notice=notice)


@pytest.mark.parametrize(("own", "then"), [("-500\n", "0"), ("0\n", "as it was"), ("300\n", "as it was")])
def test_ranks_are_not_spared_as_their_agent_is(tmp_path: Path, own: str, then: str) -> None:
    """What the service's OOMScoreAdjust= spares is the agent; what it starts is a process like any other one."""
    for name, text in (("self", own), ("7", "as it was")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "oom_score_adj").write_text(text)
    spare_no_more(7, tmp_path)
    assert (tmp_path / "7/oom_score_adj").read_text() == then
    spare_no_more(8, tmp_path)
