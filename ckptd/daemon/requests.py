"""What ranks and `ckptctl` ask of a job, turned into inputs of its machine."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptd.config import JobConfig, absolute_job
from ckptd.core import events as e
from ckptd.core.halt_events import HaltWanted
from ckptd.core.job_states import JobState
from ckptd.core.policy.halt import Conditions
from ckptd.daemon.leaving import show_halt
from ckptd.daemon.ranks import Rank
from ckptd.daemon.supervisor import Supervisor
from ckptd.errors import AgentError, CkptdError, ConfigError, NotFoundError, ProtocolError, from_json
from ckptd.halt_config import read_halt
from ckptd.launcher.command import plan_command
from ckptd.protocol import messages as m
from ckptd.types import CheckpointId, RaisedException

_MAX_FILES = 64
"""How many descriptors an answer may carry besides the two of an admission: the kernel takes 253 at once."""


def from_rank(job: Supervisor, rank: Rank, message: m.Message) -> None:  # noqa: C901, PLR0912 - a dispatch table
    """Handle a message of a rank that has joined."""
    number = rank.rank
    if job.attendance.admitted.get(number) is not rank:
        raise AgentError(f"rank {number} of job {job.config.name} is not let in yet")
    match message:
        case m.Reserve():
            if message.image_bytes <= 0:
                raise ProtocolError(f"rank {number} asks for slots of {message.image_bytes} bytes")
            job.attendance.reserve(rank, message.image_bytes)
        case m.Open():
            if len(message.files) > _MAX_FILES:
                raise ProtocolError(f"rank {number} asks for {len(message.files)} files, of at most {_MAX_FILES}")
            job.attendance.open(rank, message.files)
        case m.Restored():
            job.feed(e.RankRestored(number, message.seconds))
        case m.RestoreFailed():
            checkpoint = CheckpointId(message.generation, message.step)
            job.feed(e.RestoreFailed(number, checkpoint, from_json(message.error)))
        case m.Stepped():
            job.feed(e.RankStepped(number, message.step, message.at_s))
        case m.Seal():
            job.attendance.look_at_pages()  # what led to it is known before it
            job.feed(_sealed(rank, message))
        case m.Missed():
            error = None if message.error is None else from_json(message.error)
            job.feed(e.CaptureMissed(number, message.step, error))
        case m.Imported():
            if job.processes is not None:
                job.processes.learn(message.modules)
        case m.Request():
            job.feed(e.CheckpointWanted())
        case m.Leave():
            rank.leaving = rank.left = True
            job.attendance.look_at_pages(leaving=True)
            job.feed(e.RankLeft(number, message.step))
        case _:
            raise AgentError(f"{type(message).__name__} is no message of a rank")


def _sealed(rank: Rank, message: m.Seal) -> e.RankSealed:
    if message.slot not in rank.lent:
        raise AgentError(f"rank {rank.rank} sealed slot {message.slot}, which it was not lent")
    return e.RankSealed(
        rank.rank,
        message.step,
        message.slot,
        message.image_bytes,
        message.seconds,
        message.values,
        message.final,
        message.witness,
    )


def exception_of(message: m.Raised) -> RaisedException:
    """Return the exception that a rank ends with."""
    try:
        return replace(RaisedException.from_json(message.exception), told_s=time.monotonic())
    except KeyError as error:
        raise ProtocolError(f"rank {message.rank} reports an exception without {error}") from error


def attached_config(message: m.Join, folder: Path) -> JobConfig:
    """Return the settings of a job whose ranks somebody else starts, from what its first rank says."""
    config = JobConfig.from_json(
        {"name": message.job, "command": [], "nproc": message.world_size, "store": "", **message.options}
    )
    return absolute_job(config, folder)


def check_command(config: JobConfig) -> None:
    """Refuse what can't be started before anything is touched; raises `ConfigError`."""
    if not Path(config.cwd).is_dir():
        raise ConfigError(f"there is no folder {config.cwd} to run in")
    path = config.env.get("PATH", os.environ.get("PATH"))
    if shutil.which(config.python, path=path) is None:
        raise ConfigError(f"can't start {config.python}: no such program", hint="--python names the ranks' interpreter")
    plan_command(config.command, preload=bool(config.preload), python=config.python, cwd=config.cwd, path=path)


async def control(job: Supervisor, message: m.Control) -> dict[str, Any]:
    """Do what `ckptctl checkpoint | stop | halt | restart` asks, and wait for its effect if asked to."""
    match message.verb:
        case "checkpoint":
            return await _checkpoint(job, wait=message.wait)
        case "stop":
            wishes = message.options
            grace_s = read_halt({"grace": wishes["grace"]}).grace_s if "grace" in wishes else job.config.halt.grace_s
            job.stop(grace_s, checkpoint=not wishes.get("no_checkpoint"), reason="`ckptctl stop` asked for it")
            if message.wait:
                end = await asyncio.shield(job.ended)
                return {"job": job.config.name, "outcome": end.outcome}
            return {"job": job.config.name, "outcome": "stopping"}
        case "halt":
            return _halt(job, message.options)
        case "restart":
            return _restart(job, message.step)
    raise AgentError(f"unknown request {message.verb!r}")


def _halt(job: Supervisor, wishes: dict[str, Any]) -> dict[str, Any]:
    """Set, clear or just show the conditions upon which a job stops by itself."""
    if wishes and not job.config.supervised:
        raise AgentError(f"the ranks of job {job.config.name} are somebody else's: ckptd does not end them")
    if wishes:
        before = Conditions() if wishes.get("clear") else job.machine.conditions
        said = read_halt({key: wishes[key] for key in ("after_step", "at") if key in wishes})
        conditions = Conditions(
            before.after_step if said.after_step is None else said.after_step,
            before.at if said.at is None else said.at,
            before.at_next_checkpoint or bool(wishes.get("at_next_checkpoint")),
        )
        job.feed(HaltWanted(conditions))
        job.write_down()
    return {"job": job.config.name, **show_halt(job.machine)}


def _restart(job: Supervisor, step: int | None) -> dict[str, Any]:
    machine = job.machine
    if machine.state not in (JobState.STARTING, JobState.RUNNING, JobState.BACKOFF):
        raise AgentError(f"job {job.config.name} is {machine.state.value}: there is nothing to restart")
    generation = machine.generation
    if step is not None and machine.state is JobState.STARTING and generation is not None and not generation.pids:
        began = f"step {generation.first_step}"
        raise AgentError(
            f"generation {generation.number} of job {job.config.name} is about to begin, with {began}",
            hint="ask again once its ranks are there",
        )
    begins = None if step is None else machine.offers.newest_until(step, machine.keeper.book.complete)
    if step is not None and begins is None:
        raise NotFoundError(
            f"job {job.config.name} has no checkpoint at step {step} or before it that it could begin with",
            hint=f"`ckptctl ls {job.config.name}` lists what there is; the job goes on",
        )
    job.feed(e.RestartWanted(step))
    return {"job": job.config.name, "step": None if begins is None else begins.step}


async def _checkpoint(job: Supervisor, *, wait: bool) -> dict[str, Any]:
    if job.machine.state is not JobState.RUNNING:
        raise AgentError(f"job {job.config.name} is {job.machine.state.value}: only a running job can be checkpointed")
    generation = job.machine.generation
    assert generation is not None
    # A flush that is under way already would be an answer to another question.
    now = CheckpointId(generation.number, generation.newest_step)
    job.feed(e.CheckpointWanted())
    while wait and not _committed_since(job, now):
        if job.ended.done():
            raise _ended(job)
        await asyncio.sleep(0.02)
    last = job.machine.keeper.last_committed
    return {"job": job.config.name, "step": last.id.step if last is not None and last.id >= now else None}


def _committed_since(job: Supervisor, checkpoint: CheckpointId) -> bool:
    last = job.machine.keeper.last_committed
    return last is not None and last.id >= checkpoint


def _ended(job: Supervisor) -> CkptdError:
    return AgentError(f"job {job.config.name} ended before the checkpoint was committed")
