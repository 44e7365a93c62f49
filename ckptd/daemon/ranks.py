"""One rank as the agent holds it: its connection, its control page, and a pidfd when nobody else watches it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ckptd.core.number_events import Report
from ckptd.core.restore import MEMORY
from ckptd.daemon.arena import Slot, make_page
from ckptd.daemon.exits import Exits, wait_status
from ckptd.daemon.fdstore import FdStore, page_name
from ckptd.daemon.offers import Offer, close_all
from ckptd.daemon.server import Peer
from ckptd.errors import AgentError, CkptdError, ProtocolError
from ckptd.protocol.messages import Admitted, Done, Lent, Opened
from ckptd.protocol.page import ControlPage, Word
from ckptd.types import Evidence, RaisedException, RankExit


def offer_of(offer: Offer) -> dict[str, Any]:
    """Return what `Admitted` says of what a rank may begin with."""
    source = offer.source
    return {**source.id._asdict(), "tier": source.tier, "in_memory": source.tier == MEMORY}


class Terms(NamedTuple):
    """What a rank needs to find its job's next agent: the name of the job's run, and how long to look; 0: it won't."""

    incarnation: str
    agent_wait_s: float


class Rank:
    """A rank that has joined. It lives for one generation; `kept` has systemd hold on to its control page, too."""

    def __init__(self, job: str, rank: int, peer: Peer, kept: FdStore) -> None:
        self.job = job
        self.rank = rank
        self.peer = peer
        self.page: ControlPage | None = None
        self.lent: tuple[int, ...] = ()
        self.waits_for_slots = False
        self.leaving = False
        self.left = False
        self.ended = False
        """Whether we have killed it."""
        self.unwinding = False
        """Whether nobody has caught what it raised: nothing but its way out is left of its process."""
        self.exception: RaisedException | None = None
        self.numbers: Mapping[str, Any] = {}
        """What it is told of reports when it is let in, as `Admitted` says."""
        self._reports: int | None = None
        """How many of its reports were read; None when an agent before has read some."""
        self._page_descriptor: int | None = None
        self._kept = kept
        self._pidfd: int | None = None
        self._wait_status: int | None = None
        """How its process ended, once it has and if that can be known."""

    def place(self, held: Collection[int], *, whole: bool, chaos: bool = False) -> None:
        """Give the rank its control page, on which slots in `held` are in use; it is lent when the rank is let in.

        With `chaos` the job lets its ranks be harmed on purpose.
        """
        self._page_descriptor, self.page = make_page(self.job, self.rank, held)
        self._kept.put(page_name(self.job, self.rank), self._page_descriptor)
        self.page.words[Word.HARM_ALLOWED] = chaos
        self._reports = 0
        if whole:
            self.capture_whole()

    def take_back(self, descriptor: int) -> ControlPage:
        """Take the control page back that an agent has lent, whose descriptor goes over to us.

        Raises `ProtocolError` for a page of another layout, and `AgentError` for what is none.
        """
        try:
            self.page = ControlPage(descriptor)
            self._kept.put(page_name(self.job, self.rank), descriptor)
        except (OSError, ValueError) as error:
            raise AgentError(f"rank {self.rank} hands back what is no control page: {error}") from error
        finally:
            os.close(descriptor)
        if not self.page.valid:
            raise ProtocolError(f"the control page of rank {self.rank} has another layout than this agent knows")
        return self.page

    def admit(self, generation: int, offer: Offer | None, terms: Terms) -> None:
        """Let the rank in, unless it is gone: lend its control page and what it may restore."""
        if self._page_descriptor is None:
            return
        descriptors = [self._page_descriptor]
        self._page_descriptor = None
        try:
            if offer is not None:
                descriptors.append(offer.manifest())
            offered = None if offer is None else offer_of(offer)
            admitted = Admitted(generation, offered, *terms, numbers=dict(self.numbers))
            self.peer.send(admitted, tuple(descriptors))
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

    def announce(self, step: int | None, *, last: bool) -> None:
        """Write the step to capture next, at which the rank is to wait if it is the last one."""
        if self.page is not None:
            self.page.announce(step, last=last)

    def leave(self) -> None:
        """Tell the rank to leave; that it closes its connection is no surprise then."""
        self.left = True
        if self.page is not None:
            self.page.leave()

    def capture_whole(self) -> None:
        """Have the rank capture all replicated tensors as its own."""
        if self.page is not None:
            self.page.words[Word.WHOLE] = 1

    def release(self, slot: int) -> None:
        """Let the rank write a slot again."""
        if self.page is not None:
            self.page.release(slot)

    def look(self, now_ns: int) -> None:
        """Let the rank see that its agent is alive."""
        if self.page is not None:
            self.page.words[Word.AGENT_NS] = now_ns

    @property
    def step(self) -> int | None:
        """The last finished step, None while the rank has not begun."""
        return None if self.page is None else int(self.page.words[Word.STEP])

    def reports(self) -> tuple[list[Report], int]:
        """Return what it has reported since the last time, and how many of these reports are lost."""
        if self.page is None:
            return [], 0
        self._reports, found, missed = self.page.reports(self._reports)
        return [Report(step, value) for step, value in found], missed

    @property
    def phase(self) -> str:
        """What the rank says it is doing."""
        return "joining" if self.page is None else self.page.phase.name.lower()

    @property
    def section(self) -> str | None:
        """The name of the section that the rank is in, if it is in one."""
        inside = self.page is not None and self.page.words[Word.SECTION_UNTIL_NS]
        return self.page.section if self.page is not None and inside else None

    def dismiss(self) -> None:
        """Answer a rank that waits to leave."""
        if self.leaving:
            self.leaving = False
            self.peer.send(Done())

    def refuse(self, error: CkptdError) -> None:
        """Answer the rank's request with the reason why it isn't done."""
        self.peer.refuse(error)

    def evidence(self, at_s: float, exits: Exits) -> Evidence | None:
        """Judge the end of a process that is somebody else's child: by how it ended where the kernel tells.

        A rank that has not left its block has failed, also when its exit code is 0.
        """
        if self.left:
            return None
        status = self._wait_status
        if status is not None:
            code, core_dumped = os.waitstatus_to_exitcode(status), os.WCOREDUMP(status)
            end = RankExit(self.rank, self.peer.pid, code, at_s, self.exception, core_dumped=core_dumped)
            claim = exits.evidence(end, at_s)
            if claim is not None:
                return claim
        if self.ended:
            return Evidence("pidfd", "signal", self.rank, 1.0, f"ckptd ended rank {self.rank}", at_s, signal.SIGKILL)
        told_s = None if self.exception is None else self.exception.told_s
        if self.exception is not None and (told := self.exception.exit_code) is not None:
            summary = f"rank {self.rank} ended with exit code {told}"
            return Evidence("pidfd", "exit", self.rank, 1.0, summary, at_s, returncode=told, told_s=told_s)
        if self.exception is not None:
            summary = f"rank {self.rank} raised {self.exception.type}: {self.exception.message}"
            return Evidence(
                "pidfd", "exception", self.rank, 1.0, summary, at_s, exception=self.exception, told_s=told_s
            )
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

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, if it is watched and has not ended."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def end(self) -> None:
        """Kill the process, whatever it is doing."""
        self.ended = True
        self.send_signal(signal.SIGKILL)

    def _gone(self, on_gone: Callable[[], None]) -> None:
        if self._pidfd is not None:
            self._wait_status = wait_status(self.peer.pid, self._pidfd)
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
            self._kept.remove(page_name(self.job, self.rank))
        if self._page_descriptor is not None:
            os.close(self._page_descriptor)
            self._page_descriptor = None
