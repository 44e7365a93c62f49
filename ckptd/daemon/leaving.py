"""What tells a job from outside that its time is coming: its settings as a policy, and a notice that is looked for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from ckptd.core.job import JobMachine, Now
from ckptd.core.policy.halt import Conditions, HaltPolicy
from ckptd.halt_config import NOTICE_FILE, HaltConfig
from ckptd.log import Logger

_FILE_EVERY_S = 0.5
_COMMAND_EVERY_S = 5.0
_COMMAND_DEADLINE_S = 10.0


def policy_of(config: HaltConfig) -> HaltPolicy:
    """Return the policy of a run that begins now."""
    now_s, wall = time.monotonic(), time.time()
    limit_s = config.time_limit_s
    return HaltPolicy(
        grace_s=config.grace_s,
        margin_s=config.margin_s,
        began_s=now_s,
        began_at=wall,
        limit_at_s=None if limit_s is None else now_s + limit_s,
        ends_at=config.ends_at,
        conditions=Conditions(config.after_step, config.at),
    )


def show_halt(machine: JobMachine) -> dict[str, Any]:
    """Return what `ckptctl status --json` says of a job's end: what it waits for, or how it goes on."""
    now = Now(time.monotonic(), time.time())
    left, until_s, conditions = machine.time_left(now), machine.leave_by_s, machine.conditions
    return {
        "after_step": conditions.after_step,
        "at": conditions.at,
        "at_next_checkpoint": conditions.at_next_checkpoint,
        "left_s": None if left is None else round(left.left_s, 3),
        "margin_s": None if left is None else round(left.margin_s, 3),
        "stopping": machine.why,
        "grace_left_s": None if until_s is None else round(max(0.0, until_s - now.s), 3),
    }


async def until_notice(notice: str, logger: Logger) -> str:
    """Wait for a notice that the machine is about to be taken away; return what it was, for people.

    A file is there, or a command has ended with 0. What can't be looked at is no notice, and said once.
    """
    path = notice.removeprefix(NOTICE_FILE) if notice.startswith(NOTICE_FILE) else None
    said = False
    while True:
        there, problem = await asyncio.to_thread(_file, Path(path)) if path is not None else await _command(notice)
        if there:
            return f"the file {path} is there" if path is not None else f"`{notice}` ended with 0"
        if problem is not None and not said:
            said = True
            logger.warning("notice unreadable", notice=notice, problem=problem)
        await asyncio.sleep(_COMMAND_EVERY_S if path is None else _FILE_EVERY_S)


def _file(path: Path) -> tuple[bool, str | None]:
    try:
        path.stat()
    except FileNotFoundError:
        return False, None
    except OSError as error:
        return False, str(error.strerror)
    return True, None


async def _command(command: str) -> tuple[bool, str | None]:
    """Run a command in a shell; what it prints is not read. That a busy node starts none now ends no job."""
    nowhere = subprocess.DEVNULL
    try:
        process = await asyncio.create_subprocess_shell(
            command, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True
        )
    except OSError as error:
        return False, str(error.strerror)
    try:
        returncode = await asyncio.wait_for(process.wait(), _COMMAND_DEADLINE_S)
    except TimeoutError:
        return False, f"it takes longer than {_COMMAND_DEADLINE_S:g} s"
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended in this moment
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    not_run = returncode in (126, 127)
    return returncode == 0, f"the shell says {returncode}: no such program" if not_run else None
