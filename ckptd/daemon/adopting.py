"""What an agent before this one has left of a job, and how it comes into this one's hands: journal, slots and ranks."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace
from typing import Any

from ckptd.core.adopt_events import HeldShard, RankReturned
from ckptd.core.handover import Handover
from ckptd.core.job import JobMachine, JobSpec, Now
from ckptd.core.job_states import JobState
from ckptd.core.policy.halt import Conditions
from ckptd.daemon.arena import Arena
from ckptd.daemon.fdstore import FdStore
from ckptd.daemon.living import boot_id, is_alive
from ckptd.errors import CkptdError, ProtocolError
from ckptd.journal import JobEntry, Life
from ckptd.log import Logger
from ckptd.protocol.messages import Rejoin, Seal
from ckptd.protocol.page import MAX_SLOTS, ControlPage, Word
from ckptd.types import CheckpointId

_SLOT_NAME = re.compile(r"(\d+)/slot(\d+)")


def new_incarnation() -> str:
    """Return a name for a run of a job, which no other run has."""
    return secrets.token_hex(8)


@dataclass(frozen=True, slots=True)
class Legacy:
    """What is left of a job that an agent before us has run in this boot of the node."""

    life: Life
    handover: Handover

    @property
    def pids(self) -> dict[int, int]:
        """The processes of the ranks that may train on, by rank; none when what was there can't go on."""
        return dict(self.handover.pids) if self.handover.has_ranks else {}

    def has_living(self) -> bool:
        """Whether any of them still runs."""
        began = self.life.ranks_started
        return any(is_alive(pid, began.get(str(rank), 0), self.life.boot_id) for rank, pid in self.pids.items())


def legacy_of(entry: JobEntry) -> Legacy | None:
    """Return what is left of a job; None when that is nothing.

    Of what is not understood, since another version has written it, only the launcher is: to be ended with its ranks.
    """
    life = entry.life
    if life.boot_id != boot_id() or not life.incarnation:
        return None
    try:
        handover = Handover.from_json(life.handover)
        trial = JobMachine(JobSpec(entry.job, 1, 1.0))
        trial.recovery.recall(handover.recovery)
        trial.recall_bounds(handover.halting, Now(0.0, 0.0))
    except (AttributeError, KeyError, TypeError, ValueError):
        return Legacy(life, Handover(""))
    if life.stopped and handover.has_ranks:
        handover = replace(handover, state=JobState.STOPPING.value)
    return Legacy(life, handover)


def conditions_of(entry: JobEntry) -> Conditions | None:
    """Return upon what a job was to stop by itself, None where that is not known.

    Somebody has set them for this run of it, which a boot of the node does not end: they are all of it that holds then.
    """
    try:
        return Conditions(**entry.life.handover["halting"]["conditions"])
    except (KeyError, TypeError):
        return None


def take_slots(job: str, arena: Arena, kept: FdStore, logger: Logger) -> list[tuple[int, int]]:
    """Take over the slots of a job that systemd has kept; return which, by rank and number."""
    taken: list[tuple[int, int]] = []
    for name in kept.inherited:
        found = _SLOT_NAME.fullmatch(name.removeprefix(f"{job}/")) if name.startswith(f"{job}/") else None
        descriptor = None if found is None else kept.take(name)
        if found is None or descriptor is None:
            continue
        place = int(found[1]), int(found[2])
        try:
            arena.adopt(*place, descriptor)
        except CkptdError as error:
            logger.warning("slot lost", rank=place[0], slot=place[1], error=str(error))
        else:
            taken.append(place)
    return taken


def returned(message: Rejoin, pid: int, page: ControlPage) -> RankReturned:
    """Return what a rank says that comes back; its control page says which of its slots hold anything.

    Raises `ProtocolError` for what is no account of slots.
    """
    numbers: list[int] = []
    sealed: list[HeldShard] = []
    unknown: list[int] = []
    for item in message.slots:
        number, seal = item.get("slot"), item.get("seal")
        if not isinstance(number, int) or not 0 <= number < MAX_SLOTS or number in numbers:
            raise ProtocolError(f"rank {message.rank} comes back with slot {number!r}")
        numbers.append(number)
        if page.slot_free(number):
            continue
        if seal is None:
            unknown.append(number)
        else:
            sealed.append(_held(number, seal, message))
    return RankReturned(
        message.rank,
        pid,
        message.step,
        message.restored,
        message.stepped,
        tuple(numbers),
        tuple(sealed),
        tuple(unknown),
        bool(page.words[Word.WHOLE]),
    )


def _held(number: int, fields: dict[str, Any], message: Rejoin) -> HeldShard:
    try:
        seal = Seal(**fields)
    except TypeError as error:
        raise ProtocolError(f"rank {message.rank} says of slot {number} what is no seal: {error}") from error
    return HeldShard(
        number,
        CheckpointId(message.generation, seal.step),
        seal.image_bytes,
        seal.values,
        seal.seconds,
        seal.final,
        seal.witness,
    )
