"""What the verbs share: where jobs and tiers are found, and how an agent is asked."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.config import AgentConfig, JobConfig, absolute_store
from ckptd.core import lineage
from ckptd.errors import AgentError, ConfigError, NotFoundError
from ckptd.journal import JobEntry, Journal
from ckptd.plugin.manager import PluginManager
from ckptd.protocol.channel import Channel, expect, open_channel
from ckptd.protocol.messages import Done, Message
from ckptd.storage import catalog
from ckptd.storage.tier import Tier
from ckptd.types import CheckpointId

_CALL_DEADLINE_S = 10.0
LONG_CALL_DEADLINE_S = 3600.0


@dataclass(frozen=True, slots=True)
class JobPlace:
    """Where the checkpoints of a job are."""

    job: str
    tier: Tier


def find_job(name: str, store: str | None) -> JobPlace:
    """Return where a job's checkpoints are: in `store` when given, else where the journal says that it ran."""
    if store is None:
        entry = known_job(name)
        store = JobConfig.from_json(entry.config).store
    config = AgentConfig.from_environ(os.environ)
    manager = PluginManager(lambda *_: None, config.blocked_plugins)
    return JobPlace(name, manager.open_tier(absolute_store(store, Path.cwd())))


def known_job(name: str) -> JobEntry:
    """Return the journal's entry of a job; raises `NotFoundError` that lists what there is."""
    journal = open_journal()
    entry = journal.read_job(name)
    if entry is None:
        known = ", ".join(item.job for item in journal.read_jobs()[:10]) or "none yet"
        raise NotFoundError(f"there is no job {name}", hint=f"jobs known here: {known}; or name its --store")
    return entry


def open_journal() -> Journal:
    """Open the journal of this user for reading."""
    return Journal(AgentConfig.from_environ(os.environ).home, read_only=True)


def checkpoints(place: JobPlace) -> list[CheckpointId]:
    """Return all committed checkpoints of a job, newest first; raises `NotFoundError` when the job is not there."""
    held = catalog.holdings(place.tier, place.job)
    if not held.parents and not held.committed:
        raise NotFoundError(
            f"there is no job {place.job} in {place.tier.url}",
            hint=f"jobs there: {', '.join(catalog.jobs(place.tier)) or 'none'}",
        )
    return sorted(held.committed, reverse=True)


def pick(place: JobPlace, step: int | None) -> CheckpointId:
    """Return the newest checkpoint of the lineage, or that of `step`; raises `NotFoundError`."""
    held = catalog.holdings(place.tier, place.job)
    line = lineage.candidates(held.parents, held.committed)
    chosen = [item for item in line if step is None or item.step == step]
    if not chosen:
        known = ", ".join(str(item.step) for item in line[:10]) or "none"
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise NotFoundError(f"job {place.job} has {what} in {place.tier.url}", hint=f"newest steps: {known}")
    return chosen[0]


def step_number(text: str | None) -> int | None:
    """Read a step from the command line."""
    if text is None:
        return None
    if not text.isdigit():
        raise ConfigError(f"{text!r} is no step", hint="a step is a whole number, as `ckptctl ls` shows them")
    return int(text)


def ask(path: Path | str, message: Message, deadline_s: float = _CALL_DEADLINE_S) -> dict[str, Any]:
    """Send a request to the agent at `path` and return its result; raises `AgentError` when none is there."""
    try:
        channel, _ = open_channel(str(path), "ctl", _CALL_DEADLINE_S)
    except OSError as error:
        raise AgentError(
            f"no agent answers at {path}: {error.strerror or error}", hint="start it: systemctl start ckptd, or ckptd &"
        ) from error
    return _ask(channel, message, deadline_s)


def _ask(channel: Channel, message: Message, deadline_s: float) -> dict[str, Any]:
    try:
        return expect(channel.call(message, deadline_s), Done).result
    finally:
        channel.close()


def ask_owner(name: str, message: Message, deadline_s: float = _CALL_DEADLINE_S) -> dict[str, Any]:
    """Send a request to the agent that runs a job."""
    entry = known_job(name)
    if not Path(entry.agent_socket).exists():
        raise AgentError(
            f"job {name} is not running: its agent (pid {entry.agent_pid}) is gone",
            hint="run the same command again: it goes on from the newest checkpoint",
        )
    return ask(entry.agent_socket, message, deadline_s)


def when(wall_s: float) -> str:
    """Return a moment as people read it, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(wall_s))
