"""A model rank: the life of a training process, step for step as `ckptd.client.run` lives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptd.core import events as e
from ckptd.core.number_events import Report
from ckptd.core.restore import Source
from ckptd.errors import RESUMABLE, AgentError, DamagedError
from ckptd.types import RaisedException
from tests.simulation import takeover
from tests.simulation.clock import Channel, Signal, Steps
from tests.simulation.collective import Collective
from tests.simulation.memory import NEVER, PARTS, Cell, Page, Slot, advance, cell_of, state_after

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent
    from tests.simulation.node import Node

FINAL_SLOT_DEADLINE_S = 120.0


class RankProcess:
    """A process that trains. `generation` is 0 when another launcher than ckptd's has started it."""

    def __init__(self, node: Node, rank: int, pid: int, generation: int, collective: Collective) -> None:
        self.node, self.rank, self.pid, self.generation = node, rank, pid, generation
        self.alive = True
        self.returncode: int | None = None
        self.exception: RaisedException | None = None
        self.page: Page | None = None
        self.slots: dict[int, Slot] = {}
        self.lent: tuple[int, ...] = ()
        self.capturing = False
        self.left = False
        self.leaving: Signal | None = None
        self.step = 0
        self.restored = self.replaced = False
        self.own_steps = 0
        """How many it has finished itself."""
        self.stuck = False
        self._sees_later = False
        """Whether another agent has come while it hung."""
        self.spoilt = False
        """Whether its weights came of a NaN."""
        self.skips: Sequence[tuple[int, int]] = ()
        self.state = state_after(rank, 0)
        self._collective = collective
        self._agent = node.agent
        self._channel = Channel(node.clock, node.agent, "message", node.latency_s)
        self._call: Signal | None = None
        self._asked: object = None
        """The question that the rank waits to have answered."""
        self._untold: list[object] = []
        """What waits for the next agent."""
        self.seals: dict[int, e.RankSealed] = {}
        """The last seal of each slot."""
        self._fresh = True
        self._handled = NEVER
        self._captured_step = -1
        self._size = 1
        node.clock.start(self, "rank", self._lives(), node.rng.uniform(0.1, 0.3))

    def __repr__(self) -> str:
        return f"rank {self.rank} (pid {self.pid})"

    # --- what the agent does to it ----------------------------------------------------------------------------

    def answer(self, value: Any) -> None:
        """Answer the request that the rank waits for."""
        if self._call is not None:
            self._call.fire(value)

    def admit(self, generation: int, offer: Source | None) -> None:
        """Let it in."""
        self.answer((generation, offer))

    def close(self) -> None:
        """Close the agent's end of the connection: what is still on its way is lost."""
        self._agent.connections.discard(self)

    # --- its life ---------------------------------------------------------------------------------------------

    def hang(self, seconds: float) -> None:
        """Do nothing any more from the next moment on, whatever that is in, for so long."""
        self.stuck = True
        self.node.hangs.stuck(self)
        self._resumes = Signal(self.node.clock)
        self.node.clock.after(seconds, self, "rank", self._go_on)

    def _go_on(self) -> None:
        self.stuck = False
        self.node.hangs.goes_on(self)
        self._resumes.fire()
        if self._sees_later:
            self.agent_is_back()

    def _lives(self) -> Steps:
        """Live, and stand still while it hangs."""
        life, value = self._life(), None
        while True:
            try:
                wanted = life.send(value)
            except StopIteration:
                return
            value = yield wanted
            if self.stuck:
                yield self._resumes

    def _life(self) -> Steps:
        options, rng = self.node.options, self.node.rng
        while not self.node.agent.alive:
            yield self.node.agent_back
        if not self._agent.alive:
            self._agent = self.node.agent
            self._channel = Channel(self.node.clock, self._agent, "message", self.node.latency_s)
        answer = yield from self._ask(("join", self.generation))
        if isinstance(answer, AgentError):
            self._raise("FencedError", answer.message)
            return
        self.generation, offer = answer
        self.restored = offer is None
        if offer is not None and not (yield from self._restore(offer)):
            return
        yield from self._reserve()
        self._show("training")
        while self.step < options.total_steps:
            yield options.step_s * rng.uniform(0.3, 1.0)
            if not (yield self._collective.arrive(self.rank, self.step + 1)):
                self._raise("RuntimeError", "connection closed by peer")
                return
            yield options.step_s * rng.uniform(0.0, 0.3)
            self._report()
            self.step += 1
            self.state = advance(self.state, self.rank, self.step)
            assert self.page is not None
            self.page.step, self.page.beat_s = self.step, self.node.clock.now_s
            self.own_steps += 1
            self.come_back()
            if self.step >= self.page.capture_step or self._fresh:
                yield from self._boundary(self.page)
                if self.page.leave:
                    self._collective.member_died()
                    self._exit(RESUMABLE)
                    return
        if (self.step > self._captured_step or (self.replaced and not self.seals)) and self.step > 0:
            yield from self._capture(final=True, patient=True)
        else:
            self._seal_again()
        self._show("left")
        while (yield from self._ask(("leave", self.step))) == "again":
            self.come_back()
            yield from self._capture(final=True, patient=True)
        self.node.witness.rank_finished(self)
        self.node.numbers.finished(self)
        yield rng.uniform(0, 0.05)
        self._exit(0)

    def _show(self, phase: str) -> None:
        """Write to the page what it does."""
        assert self.page is not None
        self.page.phase = phase

    def _report(self) -> None:
        """Report the loss of the step that is under way, unless it is skipped; a NaN on one rank spoils all weights."""
        step = self.step + 1
        if not self.node.options.nan_at or any(first <= step <= last for first, last in self.skips):
            return
        bad = self.spoilt or (step == self.node.options.nan_at and self.rank == 0)
        assert self.page is not None
        self.page.reports.append(Report(step, float("nan") if bad else 1.0))
        self.spoilt = self.spoilt or step == self.node.options.nan_at

    def _ask(self, message: object) -> Steps:
        self.come_back()
        self._call, self._asked = Signal(self.node.clock), message
        self.tell(message)
        answer = yield self._call
        self._asked = None
        return answer

    def turn_to(self, agent: ModelAgent) -> None:
        """Ask another supervisor for the rank's place."""
        self._agent = agent
        self._channel = Channel(self.node.clock, agent, "message", self.node.latency_s)
        self.tell(("join", self.generation))

    def tell(self, message: object) -> None:
        """Send something to the agent; what it can't be told waits for the next one, which sees the slots itself."""
        if isinstance(message, e.RankSealed):
            self.seals[message.slot] = message
        if self._agent.alive:
            self._channel.send(self._agent.received, self, message)
        elif not isinstance(message, e.RankSealed) and message is not self._asked:
            self._untold.append(message)

    def come_back(self) -> None:
        """Come back to the next agent, if there is one."""
        agent = self.node.agent
        if self._agent.alive or agent is self._agent or not agent.alive or self.page is None:
            return
        self._agent, self.replaced = agent, True
        self._channel = Channel(self.node.clock, agent, "message", self.node.latency_s)
        self._channel.send(takeover.rank_returned, agent, self, takeover.account(self))
        untold, self._untold = self._untold, []
        for message in [*untold, self._asked]:
            if message is not None:
                self.tell(message)

    def agent_is_back(self) -> None:
        """See that there is another agent, where the rank would not see it at its next step.

        A question that the dead one has answered is none any more, however late the rank reads that.
        """
        self._sees_later = self.stuck
        if self.stuck:
            return
        waits = self._call is not None and not self._call.fired
        asked = self._asked[0] if waits and isinstance(self._asked, tuple) else None
        if asked in ("join", "open"):
            self._collective.member_died()
            self._raise("AgentError", "the agent closed the connection")
        elif asked == "leave" and not self.seals and self.step:
            self.answer("again")  # what it was restored from may be gone
        elif asked is not None:
            self.come_back()

    def fenced(self) -> None:
        """End, since the job goes on without this rank."""
        self._collective.member_died()
        self._raise("FencedError", "the job goes on without this rank")

    def _reserve(self) -> Steps:
        self.slots = yield from self._ask(("reserve", self._size))

    def _restore(self, source: Source) -> Steps:
        """Read the own shard, and of every other rank's the share of replicated state that this one needs."""
        options, rng, world = self.node.options, self.node.rng, range(self.node.options.world_size)
        self._show("restoring")
        offer = yield from self._ask(("open",))
        if offer is None:
            self._raise("AgentError", "another agent has not what was offered")
            return False
        self.node.witness.offer_opened(self, source, offer)
        wanted = [(self.rank, part) for part in range(PARTS)]
        wanted += [(other, rng.randrange(PARTS)) for other in world if other != self.rank]
        rng.shuffle(wanted)
        mine: dict[int, Cell] = {}
        for owner, part in wanted:
            yield options.restore_part_s * rng.uniform(0.3, 1.0)
            cell, damaged = offer.read(owner, part)
            if damaged:
                error = DamagedError(f"part {part} of rank {owner} is not what was captured")
                self.tell(e.RestoreFailed(self.rank, source.id, error))
                self._raise("DamagedError", error.message)
                return False
            self.node.witness.rank_reads(self, source.id, owner, part, cell)
            if owner == self.rank:
                mine[part] = cell
        self.state = self.restored_state(mine[0])
        self.step = self._captured_step = source.id.step
        self.spoilt = source.id in self.node.numbers.spoilt
        assert self.page is not None
        self.page.step = self.step
        self.restored = True
        self.tell(e.RankRestored(self.rank, 0.0))
        return True

    def restored_state(self, cell: Cell) -> int:
        """Return the state to train on from."""
        return cell.state

    def _boundary(self, page: Page) -> Steps:
        if self._fresh:
            self._fresh = False
            self.tell(e.RankStepped(self.rank, self.step, self.node.clock.now_s))
            self._size = 2 if self.node.options.state_grows else 1
            if not any(slot.size >= self._size for slot in self.slots.values()):
                yield from self._reserve()
        wanted = page.capture_step
        if self.step < wanted or wanted == self._handled or page.leave:
            return
        self._handled = wanted
        if self.step != wanted:
            self.tell(e.CaptureMissed(self.rank, wanted, None))
            return
        last, begin_s = wanted == page.last_step, self.node.clock.now_s
        yield from self._capture(final=False, patient=last)
        if last and self._captured_step == self.step:
            yield from self._wait_for_all(page, self.node.clock.now_s - begin_s)

    def _wait_for_all(self, page: Page, took_s: float) -> Steps:
        """Wait at the last step until all may leave, or that is in vain."""
        end_s = self.node.clock.now_s + max(2.0, 10 * took_s)
        while not page.leave and page.last_step == self.step and self.node.clock.now_s < end_s:
            yield 0.01
            self.come_back()

    def _capture(self, *, final: bool, patient: bool) -> Steps:
        self._show("leaving" if patient else "capturing")
        yield from self._capture_to_slot(final=final, patient=patient)
        self._show("training")

    def _capture_to_slot(self, *, final: bool, patient: bool) -> Steps:
        slot = self._free_slot()
        end_s = self.node.clock.now_s + FINAL_SLOT_DEADLINE_S
        if slot is None and patient:
            self.tell(e.CheckpointWanted())  # a single slot is given up for a step to come
        while slot is None and patient and self.node.clock.now_s < end_s:
            yield 0.05
            self.come_back()
            slot = self._free_slot()
        if slot is None:
            self.node.witness.no_slot(self, final=final)
            self.tell(e.CaptureMissed(self.rank, self.step, AgentError("every slot is busy")))
            return
        self.capturing = True
        assert self.page is not None
        whole = self.page.whole
        for part in range(PARTS):
            self.node.witness.slot_written(slot, f"a capture of step {self.step}")
            slot.write(part, cell_of(self.rank, self.step, self.state, part))
            yield self.node.options.capture_part_s * self.node.rng.uniform(0.1, 1.0)
        self.capturing = False
        self.page.seal(slot.number)
        self.node.numbers.captured(self)
        values, witness = {"loss": float(self.step)}, {} if whole else self._witness()
        self.tell(e.RankSealed(self.rank, self.step, slot.number, self._size, 0.0, values, final, witness))
        self._captured_step = self.step

    def _seal_again(self) -> None:
        """Say of the last step, where it was captured before training was over, that its seal is final."""
        last = next((seal for seal in self.seals.values() if seal.step == self.step), None)
        if last is None:
            return
        assert self.page is not None
        if self.page.free(last.slot):
            self.page.seal(last.slot)
        self.tell(replace(last, final=True))

    def _witness(self) -> dict[str, str]:
        """Return what this rank says of a replicated tensor, of which it captures but a share."""
        options = self.node.options
        if options.world_size == 1:
            return {}
        differs = options.differ_from is not None and self.step >= options.differ_from
        return {"replicated": f"{self.step} of rank {self.rank}" if differs and self.rank else str(self.step)}

    def _free_slot(self) -> Slot | None:
        assert self.page is not None
        for number, slot in self.slots.items():
            if slot.size >= self._size and self.page.free(number):
                return slot
        return None

    # --- its end ----------------------------------------------------------------------------------------------

    def _raise(self, kind: str, message: str) -> None:
        self.exception = RaisedException(kind, message, f"Traceback: {kind}")
        self._exit(1)

    def _exit(self, returncode: int) -> None:
        self.returncode = returncode
        self.alive = False
        self.node.rank_ended(self)

    def kill(self, number: int) -> None:
        """Die at once, whatever it is doing."""
        if self.alive:
            self.node.witness.rank_killed(self)
            self._collective.member_died()
            self._exit(-number)
