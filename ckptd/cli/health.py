"""Which checkpoints of a job are healthy and which suspect, as far as the journal and the manifests know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptd.cli.common import JobPlace, open_journal
from ckptd.core.health import Health, told
from ckptd.errors import CkptdError
from ckptd.storage import catalog
from ckptd.types import CheckpointId


def health_of(places: Sequence[JobPlace], committed: Mapping[CheckpointId, JobPlace]) -> Health:
    """Return what is known of `committed`, each of which is on the place that is named with it.

    What an agent here has written down holds for all up to its own generation. Of what it has not seen, and where no
    agent has run the job, the newest manifest of each generation tells, which is read for that. One that can't be read
    tells nothing.
    """
    last: dict[int, CheckpointId] = {}
    for checkpoint in committed:
        last[checkpoint.generation] = max(checkpoint, last.get(checkpoint.generation, checkpoint))
    newest = sorted(last.values())
    read = catalog.in_parallel(lambda checkpoint: _values(committed[checkpoint], checkpoint), newest)
    found = Health()
    found.healthy, found.suspect = told({item: {} for item in committed} | dict(zip(newest, read, strict=True)))
    entry = None if places[0].config is None else open_journal().read_job(places[0].job)
    if entry is not None and "numbers" in entry.status:
        known = Health()
        known.recall(entry.status["numbers"])
        newer = {item for item in found.suspect if item.generation > entry.status["generation"]}
        found.suspect = newer | known.suspect
        found.healthy = (found.healthy | known.healthy) - found.suspect
    found.read(committed)
    return found


def word(health: Health, checkpoint: CheckpointId) -> str | None:
    """Return "healthy", "suspect", or None where nothing is known."""
    if checkpoint in health.suspect:
        return "suspect"
    return "healthy" if checkpoint in health.healthy else None


def _values(place: JobPlace, checkpoint: CheckpointId) -> Mapping[str, float]:
    try:
        return catalog.load_manifest(place.tier, place.job, checkpoint).values
    except CkptdError:
        return {}  # it was removed meanwhile, or is damaged, which whoever needs it says
