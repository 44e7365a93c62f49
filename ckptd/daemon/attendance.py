"""The ranks of one job as its supervisor knows them: who has come, is let in or gone, and what each is lent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

from ckptd.config import JobConfig
from ckptd.core import events as e
from ckptd.core.job import JobMachine
from ckptd.core.number_events import Reported
from ckptd.core.restore import MEMORY, Source
from ckptd.daemon.adopting import returned
from ckptd.daemon.arena import Arena
from ckptd.daemon.checkpoints import Checkpoints
from ckptd.daemon.exits import Exits
from ckptd.daemon.offers import close_all
from ckptd.daemon.orphans import Orphans
from ckptd.daemon.ranks import Rank, Terms
from ckptd.errors import AgentError, CkptdError, DamagedError, ProtocolError, StateError
from ckptd.log import Logger
from ckptd.protocol.messages import Adopted, Rejoin
from ckptd.protocol.page import MAX_SLOTS
from ckptd.types import Evidence, RaisedException

Start = Callable[[Coroutine[Any, Any, None]], None]
"""Runs work beside the loop's other work, and lets nothing that goes wrong in it pass unseen."""
_DISCONNECT_GRACE_S = 2.0


class Attendance:
    """The ranks of one job. What happens to them is fed to the job's machine, which decides."""

    def __init__(
        self,
        config: JobConfig,
        machine: JobMachine,
        *,
        arena: Arena,
        checkpoints: Checkpoints,
        exits: Exits,
        terms: Terms,
        feed: Callable[[e.Input], None],
        start: Start,
        logger: Logger,
    ) -> None:
        """Begin with nobody; `feed` is told what happens, `start` runs what has to wait."""
        self.admitted: dict[int, Rank] = {}
        self._arrived: dict[int, Rank] = {}
        self._config = config
        self._machine = machine
        self._arena = arena
        self._checkpoints = checkpoints
        self._exits = exits
        self._terms = terms
        self._orphans = Orphans(self._missed)
        """Ranks of another launcher that were taken over and are not back yet."""
        self._feed = feed
        self._start = start
        self._log = logger

    def __iter__(self) -> Iterator[Rank]:
        """Yield every rank that is here, let in or not."""
        return iter((*self.admitted.values(), *self._arrived.values()))

    def look_at_pages(self, *, leaving: bool = False) -> None:
        """Tell the machine how far the ranks are and what they report, and the ranks that somebody is looking.

        `leaving` tells that one of them is about to go.
        """
        now_ns = time.monotonic_ns()
        for rank in self.admitted.values():
            rank.look(now_ns)
        steps = {number: step for number, rank in self.admitted.items() if (step := rank.step)}
        if steps:
            self._feed(e.Progress(steps))
        found = {number: rank.reports() for number, rank in self.admitted.items()}
        reports = {number: reported for number, (reported, _) in found.items() if reported}
        if reports or leaving:
            missed = {number: lost for number, (_, lost) in found.items() if lost}
            self._feed(Reported(reports, missed, leaving))

    def announce(self, step: int | None, *, last: bool) -> None:
        """Write the step to capture next into every control page; at the last one the ranks wait."""
        for rank in self.admitted.values():
            rank.announce(step, last=last)

    def leave(self) -> None:
        """Tell every rank to leave."""
        for rank in self.admitted.values():
            rank.leave()

    def release(self, number: int, slot: int) -> None:
        """Let a rank write a slot again, if it is here."""
        if number in self.admitted:
            self.admitted[number].release(slot)

    def capture_whole(self) -> None:
        """Have every rank capture all replicated tensors as its own."""
        for rank in self.admitted.values():
            rank.capture_whole()

    def dismiss(self, number: int) -> None:
        """Answer a rank that waits to leave, if it is here."""
        if number in self.admitted:
            self.admitted[number].dismiss()

    # --- coming and going -------------------------------------------------------------------------------------

    def join(self, rank: Rank) -> None:
        """Take in a rank that asks for its place; it is admitted when its generation is ready."""
        if not self._config.supervised:
            holder = self.admitted.get(rank.rank)
            if holder is not None and holder.peer.pid == rank.peer.pid:
                self._gone(holder)  # its process begins anew, without a word
            self._watch(rank)
        # Until it is admitted, whoever has its place now must go on undisturbed.
        before = self._arrived.get(rank.rank)
        if before is not None:
            before.refuse(AgentError(f"another process has come to be rank {rank.rank} of job {self._config.name}"))
            before.close()
        self._arrived[rank.rank] = rank
        self._feed(e.RankJoined(rank.rank, rank.peer.pid))

    def await_back(self, ranks: Mapping[int, tuple[int, int]]) -> None:
        """Watch ranks of another launcher, by process and when it began, until they are back."""
        self._orphans.take(ranks)

    def _missed(self, number: int, pid: int) -> None:
        summary = f"rank {number} ended while no agent was there"
        evidence = Evidence("pidfd", "vanished", number, 1.0, summary, time.monotonic())
        self._feed(e.RankExited(number, pid, evidence))

    def rejoin(self, rank: Rank, message: Rejoin, descriptors: list[int]) -> None:
        """Take in a rank that has lost its agent, or its connection to us, with the descriptors that it hands back.

        Raises `CkptdError` when what it hands back can't be used.
        """
        try:
            if len(descriptors) != 1 + len(message.slots):
                raise ProtocolError(f"rank {rank.rank} hands back {len(descriptors)} descriptors")
            page = rank.take_back(descriptors.pop(0))
            event = returned(message, rank.peer.pid, page)
            for number in event.slots:
                self._arena.adopt(rank.rank, number, descriptors.pop(0))
            for number in set(range(MAX_SLOTS)) - self._arena.slots(rank.rank).keys():
                page.release(number)  # its memory went with the agent before us: the number is free
        finally:
            close_all(descriptors)
        before = self.admitted.pop(rank.rank, None)
        if before is not None:
            before.close()
        elif self._machine.adopting:
            rank.announce(None, last=False)  # what the agent before us has announced nobody waits for
            if self._machine.keeper.book.whole:
                rank.capture_whole()
        self._orphans.forget(rank.rank)
        if not self._config.supervised:
            self._watch(rank)
        rank.lent = event.slots
        self.admitted[rank.rank] = rank
        self._log.info("rank returned", rank=rank.rank, step=event.step)
        rank.peer.send(Adopted())
        self._feed(event)

    def _watch(self, rank: Rank) -> None:
        """Learn how a rank ends that somebody else has started."""
        self._exits.begin(rank.peer.pid, time.monotonic())
        rank.watch(lambda: self._gone(rank))

    def raised(self, pid: int, number: int, exception: RaisedException) -> None:
        """Remember what a rank that somebody else has started says of its end."""
        if number in self.admitted and self.admitted[number].peer.pid == pid:
            self.admitted[number].exception = exception.told_after(self.admitted[number].exception)

    def unwinding(self, pid: int, number: int) -> None:
        """Note that nobody has caught what a rank raised: it is as good as ended, and missed if it does not end."""
        if number in self.admitted and self.admitted[number].peer.pid == pid:
            self.admitted[number].unwinding = True

    def disconnected(self, rank: Rank) -> None:
        """Take note of a rank that closed its connection, unless it is about to end anyway."""
        admitted = self.admitted.get(rank.rank) is rank
        if admitted and not rank.left:
            asyncio.get_running_loop().call_later(_DISCONNECT_GRACE_S, self._still_disconnected, rank)
        elif not self._config.supervised:
            self._gone(rank)  # whatever its process does next has nothing to do with this job

    def _still_disconnected(self, rank: Rank) -> None:
        generation = self._machine.generation
        gone = generation is None or rank.rank in generation.gone
        if self.admitted.get(rank.rank) is rank and not gone and not rank.unwinding:
            self._log.warning("rank disconnected", rank=rank.rank, hint="it trains on unprotected; its stderr says why")
            self._feed(e.RankLeft(rank.rank, rank.step or 0))

    def let_go(self) -> None:
        """End our part in ranks that somebody else has started, and who are not ours to kill."""
        for rank in list(self.admitted.values()):
            rank.left = True
            self._gone(rank)

    def end_ranks(self, numbers: Sequence[int]) -> None:
        """Kill ranks that somebody else has started: a death is what their launcher understands."""
        for number in numbers:
            if number in self.admitted:
                self.admitted[number].end()
            else:
                self._orphans.end(number)  # it has not come back from the agent before

    def _gone(self, rank: Rank) -> None:
        """Give up the place of a rank that somebody else has started."""
        place = next((place for place in (self.admitted, self._arrived) if place.get(rank.rank) is rank), None)
        if place is None:
            return  # its connection and its process end at the same moment
        self.look_at_pages()
        del place[rank.rank]
        evidence = rank.evidence(time.monotonic(), self._exits)
        rank.close()
        self._feed(e.RankExited(rank.rank, rank.peer.pid, evidence))

    def clear(self) -> None:
        """Let go of every rank: its generation is over, or the job is."""
        for rank in self:
            rank.close()
        self.admitted, self._arrived = {}, {}
        self._orphans.close()

    def end(self, reason: CkptdError) -> None:
        """Answer everybody who waits; `reason` is for those whose request comes to nothing.

        A rank that waits must not take the job's end for a reason to begin afresh.
        """
        for rank in self.admitted.values():
            rank.dismiss()
        for rank in (*self._arrived.values(), *(item for item in self.admitted.values() if item.waits_for_slots)):
            rank.refuse(reason)

    # --- what they are lent -----------------------------------------------------------------------------------

    def admit(self, order: e.Admit) -> None:
        """Let a rank in that has arrived, with what it is offered."""
        rank = self.admitted[order.rank] = self._arrived.pop(order.rank)
        held = self._machine.keeper.book.held(order.rank)
        rank.place(held, whole=order.whole, chaos=self._config.chaos)
        rank.numbers = self._machine.numbers_to_tell()
        if order.offer is None:
            rank.admit(order.generation, None, self._terms)
        else:
            self.prepare(order.generation, order.offer)
            self._start(self._offer(rank, order.generation, order.offer))

    def prepare(self, generation: int, source: Source) -> None:
        """Make ready what a generation is offered, unless that is done."""
        keeper = self._machine.keeper
        in_memory = source.tier == MEMORY
        snapshot = keeper.order_of(keeper.book.snapshots[source.id]) if in_memory else None
        self._checkpoints.prepare(generation, source, snapshot)

    async def _offer(self, rank: Rank, generation: int, source: Source) -> None:
        """Let a rank in once its offer is ready. One that can't be made ready is damaged as far as a restart goes."""
        try:
            rank.admit(generation, await self._checkpoints.offer(generation), self._terms)
        except (DamagedError, StateError) as error:
            damage = DamagedError(f"{source} can't be offered: {error.message}", hint=error.hint)
            self._feed(e.RestoreFailed(rank.rank, source.id, damage))
            rank.refuse(damage)
        except CkptdError as error:
            rank.refuse(error)

    def open(self, rank: Rank, files: Sequence[str]) -> None:
        """Lend an admitted rank files of what it is offered."""
        generation = self._machine.generation
        if generation is None or self.admitted.get(rank.rank) is not rank:
            raise AgentError(f"rank {rank.rank} of job {self._config.name} is not offered anything")
        self._start(self._open(rank, generation.number, files))

    async def _open(self, rank: Rank, generation: int, files: Sequence[str]) -> None:
        try:
            rank.lend_files(files, await self._checkpoints.open(generation, files))
        except CkptdError as error:
            rank.refuse(error)

    def reserve(self, rank: Rank, image_bytes: int) -> None:
        """Lend a rank slots that are large enough; raises `AgentError` while it waits for others."""
        if rank.waits_for_slots:
            raise AgentError(f"rank {rank.rank} of job {self._config.name} waits for slots already")
        rank.waits_for_slots = True
        rank.lent = ()  # those that are too small are given back meanwhile
        self._start(self._reserve(rank, image_bytes))

    async def _reserve(self, rank: Rank, image_bytes: int) -> None:
        held = self._machine.keeper.book.held(rank.rank)
        try:
            numbers = await asyncio.to_thread(self._arena.reserve, rank.rank, image_bytes, held)
        except CkptdError as error:
            rank.waits_for_slots = False
            rank.refuse(error)
            self._feed(e.SetupFailed(error))
            return
        rank.waits_for_slots = False
        slots = self._arena.slots(rank.rank)
        if not slots.keys() >= set(numbers):
            return  # it has ended, and who is this rank now has asked for larger ones
        self._log.debug("slots lent", rank=rank.rank, slots=len(numbers), size_bytes=image_bytes)
        rank.lend(slots, numbers)
        self._feed(e.SlotsLent(rank.rank, tuple(numbers)))
