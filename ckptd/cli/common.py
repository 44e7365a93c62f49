"""What the verbs share: where jobs and tiers are found, and how an agent is asked."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.config import AgentConfig, JobConfig
from ckptd.core import lineage
from ckptd.errors import AgentError, CkptdError, ConfigError, NotFoundError, StoreError
from ckptd.journal import JobEntry, Journal
from ckptd.plugin.manager import PluginManager
from ckptd.protocol.channel import Channel, expect, open_channel
from ckptd.protocol.messages import Done, Message
from ckptd.storage import catalog
from ckptd.storage.tier import Tier
from ckptd.store_config import StoreConfig, absolute_stores, split_place
from ckptd.tiers import JobTier, open_stores, patient
from ckptd.types import CheckpointId

_CALL_DEADLINE_S = 10.0
LONG_CALL_DEADLINE_S = 3600.0
_MOST_DIGITS = 18
_SHOWN_CHARACTERS = 40
COMES_BACK = "it comes back by itself when the service starts: systemctl start ckptd"
GOES_ON = "run the same command again: it goes on from the newest checkpoint"
TERMINAL = ("finished", "failed", "stopped")
"""The states of a job that has ended."""
_LONG_S = 1.0
"""A pause that people notice."""


@dataclass(frozen=True, slots=True)
class JobPlace:
    """Where the checkpoints of a job are: a tier, and what the job calls it."""

    job: str
    tier: Tier
    name: str
    config: StoreConfig | None = None
    """The job's own settings there, None where just a place was named."""


def find_job(name: str, store: str | None, tier: str | None = None) -> list[JobPlace]:
    """Return where a job's checkpoints are: in `store` when given, else on every tier that the journal says it used.

    A name with a slash in it is a place and a job in one: ``s3://bucket/runs/gpt``. With `tier`, only that of the
    places is returned.
    """
    if "/" in name and store is None:
        store, name = split_place(name)
    if store is None:
        chosen = JobConfig.from_json(known_job(name, "; or name its --store").config).stores
    else:
        chosen = absolute_stores((StoreConfig(store),), Path.cwd())
    manager = open_plugins()
    if store is None:
        opened = open_stores(chosen, manager, AgentConfig.from_environ(os.environ).home)
    else:  # just there, though it may be behind a network
        alone = manager.open_tier(chosen[0].url)
        opened = [JobTier(alone.name, alone, chosen[0])]
    places = [
        JobPlace(name, patient(item.name, item.tier, _tell), item.name, item.config if store is None else None)
        for item in opened
        if tier in (None, item.name)
    ]
    if not places:
        raise NotFoundError(f"job {name} has no tier {tier}", hint=f"its tiers: {', '.join(i.name for i in opened)}")
    return places


def _tell(event: str, fields: Mapping[str, Any]) -> None:
    """Say why a command takes so long."""
    del event  # there is one
    if fields["in_s"] >= _LONG_S:
        print(f"ckptctl: {fields['error']}; trying again in {fields['in_s']:g} s", file=sys.stderr)


def open_plugins() -> PluginManager:
    """Load the plugins; one that can't be is missing then, as if it were not installed."""
    return PluginManager(lambda *_: None, AgentConfig.from_environ(os.environ).blocked_plugins)


def known_job(name: str, advice: str = "") -> JobEntry:
    """Return the journal's entry of a job; raises `NotFoundError` that lists what there is, with further `advice`."""
    journal = open_journal()
    entry = journal.read_job(name)
    if entry is None:
        known = ", ".join(item.job for item in journal.read_jobs()[:10]) or "none yet"
        raise NotFoundError(f"there is no job {name}", hint=f"jobs known here: {known}{advice}")
    return entry


def open_journal() -> Journal:
    """Open the journal of this user for reading."""
    return Journal(AgentConfig.from_environ(os.environ).home, read_only=True)


Copy = tuple[JobPlace, CheckpointId]
"""A checkpoint on one of its tiers."""


def _look(places: Sequence[JobPlace], unread: list[CkptdError] | None) -> list[tuple[JobPlace, catalog.Holdings]]:
    """Look what places hold. What can't be read now is put into `unread`, unless that is None or all of them."""
    found: list[tuple[JobPlace, catalog.Holdings]] = []
    for place in places:
        try:
            found.append((place, catalog.holdings(place.tier, place.job)))
        except StoreError as error:
            if unread is None or (place is places[-1] and not found):
                raise
            unread.append(error)
    return found


def checkpoints(places: Sequence[JobPlace], unread: list[CkptdError] | None = None) -> list[Copy]:
    """Return all committed checkpoints of a job, newest first; raises `NotFoundError` when the job is nowhere.

    With `unread`, a place that can't be read now is left out and named there, as long as another one has the job.
    """
    looked = _look(places, unread)
    if not any(held.parents or held.committed for _, held in looked):
        if unread:
            raise unread[0]
        there = sorted({job for place in places for job in catalog.jobs(place.tier)})
        raise NotFoundError(
            f"there is no job {places[0].job} in {_where(places)}", hint=f"jobs there: {', '.join(there) or 'none'}"
        )
    found = [(place, item) for place, held in looked for item in held.committed]
    return sorted(found, key=lambda item: item[1], reverse=True)  # stable: of one checkpoint the faster tier's first


def pick(places: Sequence[JobPlace], step: int | None, unread: list[CkptdError] | None = None) -> list[Copy]:
    """Return all copies of the newest checkpoint of the lineage, or of that of `step`; raises `NotFoundError`.

    `unread` is as in `checkpoints`.
    """
    parents: dict[int, CheckpointId | None] = {}
    held_by: dict[CheckpointId, list[JobPlace]] = {}
    for place, held in _look(places, unread):
        parents |= held.parents
        for item in held.committed:
            held_by.setdefault(item, []).append(place)
    line = lineage.candidates(parents, sorted(held_by))
    chosen = [item for item in line if step is None or item.step == step]
    if not chosen:
        if unread:
            raise unread[0]
        known = ", ".join(str(item.step) for item in line[:10])
        journaled = None if places[0].config is None else f"`ckptctl status {places[0].job}` says what became of it"
        hint = f"newest steps: {known}" if known else journaled
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise NotFoundError(f"job {places[0].job} has {what} in {_where(places)}", hint=hint)
    return [(place, chosen[0]) for place in held_by[chosen[0]]]


def tell_unread(unread: Sequence[CkptdError]) -> int:
    """Say which places are missing in an answer; return the exit code that says so."""
    for error in unread:
        print(f"ckptctl: not in this answer: {error}", file=sys.stderr)
    return unread[0].exit_code if unread else 0


def _where(places: Sequence[JobPlace]) -> str:
    return ", ".join(place.tier.url for place in places)


def step_number(text: str | None) -> int | None:
    """Read a step from the command line."""
    return whole_number(text, "step", "a step is a whole number, as `ckptctl ls` shows them")


def whole_number(text: str | None, what: str, hint: str) -> int | None:
    """Read the number of a `what` from the command line."""
    if text is None:
        return None
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise ConfigError(f"{text[:_SHOWN_CHARACTERS]!r} is no {what}", hint=hint)
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
        state = entry.status["state"]
        if state in TERMINAL:
            on_purpose = state == "stopped" and not entry.life.comes_back
            hint = GOES_ON if on_purpose else f"see `ckptctl status {name}`"
            raise AgentError(f"job {name} is not running: it is {state}", hint=hint)
        raise AgentError(
            f"job {name} is not running: its agent (pid {entry.agent_pid}) is gone",
            hint=COMES_BACK if entry.life.comes_back else GOES_ON,
        )
    return ask(entry.agent_socket, message, deadline_s)


def when(wall_s: float, *, zone: bool = False) -> str:
    """Return a moment as people read it, in local time; with the zone where it is held against logs, which have UTC."""
    return time.strftime(f"%Y-%m-%d %H:%M:%S{' %Z' if zone else ''}", time.localtime(wall_s))
