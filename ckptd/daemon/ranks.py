"""One rank as the agent holds it: its connection, its control page, and a pidfd when nobody else watches it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import Any

from ckptd.core.events import Admit
from ckptd.core.snapshots import Snapshot
from ckptd.daemon.arena import Slot, make_page
from ckptd.daemon.server import Peer
from ckptd.errors import CkptdError
from ckptd.protocol.messages import Admitted, Done, Lent
from ckptd.protocol.page import ControlPage, Word
from ckptd.types import Evidence, RaisedException


def offer_of(order: Admit, snapshot: Snapshot, digests: Mapping[str, str] | None) -> dict[str, Any] | None:
    """Return what `Admitted` says of the snapshot that a rank may begin with."""
    if order.offer is None:
        return None
    return {
        "generation": order.offer.id.generation,
        "step": order.offer.id.step,
        "tier": order.offer.tier,
        "slot": snapshot.slots[order.rank],
        "image_bytes": snapshot.image_bytes[order.rank],
        "digests": digests,
    }


class Rank:
    """A rank that has joined. It lives for one generation."""

    def __init__(self, job: str, rank: int, peer: Peer) -> None:
        self.job = job
        self.rank = rank
        self.peer = peer
        self.page: ControlPage | None = None
        self.lent: tuple[int, ...] = ()
        self.offered_slot: int | None = None
        self.waits_for_slots = False
        self.leaving = False
        self.left = False
        self.exception: RaisedException | None = None
        self._pidfd: int | None = None

    def admit(self, generation: int, held: Mapping[int, object], offer: dict[str, Any] | None) -> None:
        """Let the rank in: lend its control page and tell it what to restore."""
        descriptor, self.page = make_page(self.job, self.rank, tuple(held))
        self.offered_slot = None if offer is None else int(offer["slot"])
        self.peer.send(Admitted(generation, offer), (descriptor,))
        os.close(descriptor)

    def lend(self, slots: Mapping[int, Slot], numbers: list[int]) -> None:
        """Lend the numbered slots, and the one that holds the rank's offer."""
        if self.offered_slot is not None and self.offered_slot in slots:
            numbers = sorted({*numbers, self.offered_slot})
        self.lent = tuple(numbers)
        size = min((slots[number].size_bytes for number in numbers), default=0)
        self.peer.send(Lent(numbers, size), tuple(slots[number].descriptor for number in numbers))

    def announce(self, step: int | None) -> None:
        """Write the step to capture next."""
        if self.page is not None:
            self.page.announce(step)

    def release(self, slot: int) -> None:
        """Let the rank write a slot again."""
        if self.page is not None:
            self.page.release(slot)

    @property
    def step(self) -> int | None:
        """The last finished step, None while the rank has not begun."""
        return None if self.page is None else int(self.page.words[Word.STEP])

    @property
    def phase(self) -> str:
        """What the rank says it is doing."""
        return "joining" if self.page is None else self.page.phase.name.lower()

    def dismiss(self) -> None:
        """Answer a rank that waits to leave."""
        if self.leaving:
            self.leaving = False
            self.peer.send(Done())

    def refuse(self, error: CkptdError) -> None:
        """Answer the rank's request with the reason why it isn't done."""
        self.peer.refuse(error)

    def evidence(self, at_s: float) -> Evidence | None:
        """Judge the end of a process whose exit code only its own launcher learns."""
        if self.left:
            return None
        if self.exception is not None:
            summary = f"rank {self.rank} raised {self.exception.type}: {self.exception.message}"
            return Evidence("pidfd", "exception", self.rank, 1.0, summary, at_s, exception=self.exception)
        summary = f"rank {self.rank} ended while it was training"
        return Evidence("pidfd", "vanished", self.rank, 1.0, summary, at_s)

    def watch(self, on_gone: Callable[[], None]) -> None:
        """Learn of the process's end without being its parent."""
        try:
            self._pidfd = os.pidfd_open(self.peer.pid)
        except ProcessLookupError:
            asyncio.get_running_loop().call_soon(on_gone)
            return
        asyncio.get_running_loop().add_reader(self._pidfd, self._gone, on_gone)

    def _gone(self, on_gone: Callable[[], None]) -> None:
        self._unwatch()
        on_gone()

    def _unwatch(self) -> None:
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def close(self) -> None:
        """Let go of the rank; its process is none of our business any more."""
        self._unwatch()
        self.peer.connection.close()
        if self.page is not None:
            self.page.close()
            self.page = None
