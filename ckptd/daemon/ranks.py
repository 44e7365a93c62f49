"""One rank as the agent holds it: its connection, its control page, and a pidfd when nobody else watches it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ckptd.core.restore import MEMORY
from ckptd.daemon.arena import Slot, make_page
from ckptd.daemon.offers import Offer, close_all
from ckptd.daemon.server import Peer
from ckptd.errors import CkptdError
from ckptd.protocol.messages import Admitted, Done, Lent, Opened
from ckptd.protocol.page import ControlPage, Word
from ckptd.types import Evidence, RaisedException


def offer_of(offer: Offer) -> dict[str, Any]:
    """Return what `Admitted` says of what a rank may begin with."""
    source = offer.source
    return {**source.id._asdict(), "tier": source.tier, "in_memory": source.tier == MEMORY}


class Rank:
    """A rank that has joined. It lives for one generation."""

    def __init__(self, job: str, rank: int, peer: Peer) -> None:
        self.job = job
        self.rank = rank
        self.peer = peer
        self.page: ControlPage | None = None
        self.lent: tuple[int, ...] = ()
        self.waits_for_slots = False
        self.leaving = False
        self.left = False
        self.exception: RaisedException | None = None
        self._page_descriptor: int | None = None
        self._pidfd: int | None = None

    def place(self, held: Collection[int], *, whole: bool) -> None:
        """Give the rank its control page, on which slots in `held` are in use; it is lent when the rank is let in."""
        self._page_descriptor, self.page = make_page(self.job, self.rank, held)
        if whole:
            self.capture_whole()

    def admit(self, generation: int, offer: Offer | None) -> None:
        """Let the rank in, unless it is gone: lend its control page and what it may restore."""
        if self._page_descriptor is None:
            return
        descriptors = [self._page_descriptor]
        self._page_descriptor = None
        try:
            if offer is not None:
                descriptors.append(offer.manifest())
            self.peer.send(Admitted(generation, None if offer is None else offer_of(offer)), tuple(descriptors))
        finally:
            close_all(descriptors)

    def lend_files(self, files: Sequence[str], descriptors: Sequence[int]) -> None:
        """Lend files of what is offered, and close the agent's descriptors of them."""
        try:
            self.peer.send(Opened(list(files)), tuple(descriptors))
        finally:
            close_all(descriptors)

    def lend(self, slots: Mapping[int, Slot], numbers: list[int]) -> None:
        """Lend the numbered slots."""
        self.lent = tuple(numbers)
        size = min((slots[number].size_bytes for number in numbers), default=0)
        self.peer.send(Lent(numbers, size), tuple(slots[number].descriptor for number in numbers))

    def announce(self, step: int | None) -> None:
        """Write the step to capture next."""
        if self.page is not None:
            self.page.announce(step)

    def capture_whole(self) -> None:
        """Have the rank capture all replicated tensors as its own."""
        if self.page is not None:
            self.page.words[Word.WHOLE] = 1

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
        if self._page_descriptor is not None:
            os.close(self._page_descriptor)
            self._page_descriptor = None
