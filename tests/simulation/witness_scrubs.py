"""The part of the witness that looks after scrubs: what is called damaged must be, and is offered once it is mended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptd.core import events as e
from ckptd.core.restore import Source
from ckptd.core.scrub_events import Mended, Scrubbed
from ckptd.types import CheckpointId
from tests.simulation.storage import TIER

if TYPE_CHECKING:
    from tests.simulation.node import Node
    from tests.simulation.witness import Witness


class ScrubWitness:
    """What was called damaged and mended in one life of the agent."""

    def __init__(self, witness: Witness, node: Node) -> None:
        self._witness = witness
        self._node = node
        self._distrusted: set[Source] = set()
        """Copies that were called damaged by who looked at what lies there, until one looks that is not."""
        self._mended: set[CheckpointId] = set()
        """What was damaged on the disk and is not any more, though there may be word of it still."""

    def agent_begins(self) -> None:
        """Forget what was in the memory of the agent before."""
        self._distrusted.clear()
        self._mended.clear()

    @property
    def was_damaged(self) -> set[CheckpointId]:
        """What may be called damaged on the disk."""
        return self._node.disk.damaged | self._mended

    def before(self, event: e.Input) -> None:
        """Note what the machine is about to hear."""
        match event:
            case e.FetchFailed() if not event.error.retryable:
                self._distrust(event.source)
            case e.Fetched() if event.copied:
                self._trust(Source(event.source.id, TIER))
            case Scrubbed() if event.problems:
                source = event.source
                self._witness.require(source.id in self.was_damaged, f"{source} is damaged by nobody")
                self._witness.seen["damage found by a scrub"] += 1
                self._distrust(source)
            case Scrubbed() | Mended() if event.error is None and not event.problems:
                self._witness.seen["offered again"] += event.source in self._distrusted
                if event.source in self._distrusted:
                    self._trust(event.source)
            case _:
                return

    def _distrust(self, source: Source) -> None:
        self._distrusted.add(source)
        self._witness.refused.add(source)

    def _trust(self, source: Source) -> None:
        self._distrusted.discard(source)
        self._witness.refused.discard(source)

    def disk_mended(self, checkpoint: CheckpointId) -> None:
        """Note that a checkpoint on the disk is right again, which not everybody has heard of."""
        self._mended.add(checkpoint)
        self._witness.seen["mended by a scrub"] += 1
