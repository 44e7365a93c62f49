"""A model rank: the life of a training process, step for step as `ckptd.client.run` lives it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptd.core import events as e
from ckptd.errors import AgentError, DamagedError
from ckptd.types import CheckpointId, RaisedException
from tests.simulation.clock import Channel, Signal, Steps
from tests.simulation.memory import NEVER, PARTS, Cell, Page, Slot, advance, state_after

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent
    from tests.simulation.node import Node

FINAL_SLOT_DEADLINE_S = 120.0


class Collective:
    """What makes the ranks of one incarnation move in lock-step: nobody finishes a step that somebody has not begun."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._arrived: dict[int, set[int]] = {}
        self._signals: dict[int, Signal] = {}
        self._broken = False
        self.alive = True  # it owns the delays after which survivors notice

    def arrive(self, rank: int, step: int) -> Signal:
        """Join the all-reduce of a step; the signal's value is whether it went well."""
        signal = self._signals.setdefault(step, Signal(self._node.clock))
        arrived = self._arrived.setdefault(step, set())
        arrived.add(rank)
        if len(arrived) == self._node.options.world_size:
            signal.fire(True)
        elif self._broken:
            self._lose(signal)
        return signal

    def member_died(self) -> None:
        """Whoever waits for the dead one waits for ever, or gets an error after a while."""
        self._broken = True
        for signal in self._signals.values():
            if not signal.fired:
                self._lose(signal)

    def _lose(self, signal: Signal) -> None:
        if self._node.rng.random() < 0.5:
            self._node.clock.after(self._node.rng.uniform(0, 0.2), self, "peer lost", signal.fire, False)


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
        self.offered: int | None = None
        self.capturing = False
        self.left = False
        self.leaving: Signal | None = None
        self.step = 0
        self.state = state_after(rank, 0)
        self._collective = collective
        self._agent = node.agent
        self._channel = Channel(node.clock, node.agent, "message", node.latency_s)
        self._call: Signal | None = None
        self._fresh = True
        self._handled = NEVER
        self._captured_step = -1
        self._size = 1
        node.clock.start(self, "rank", self._life(), node.rng.uniform(0.1, 0.3))

    def __repr__(self) -> str:
        return f"rank {self.rank} (pid {self.pid})"

    # --- what the agent does to it ----------------------------------------------------------------------------

    def answer(self, value: Any) -> None:
        """Answer the request that the rank waits for."""
        if self._call is not None:
            self._call.fire(value)

    def admit(self, generation: int, held: set[int], offer: dict[str, Any] | None) -> None:
        """Let it in with a new control page."""
        self.page = Page(held)
        self.answer((generation, offer))

    def close(self) -> None:
        """Close the agent's end of the connection: what is still on its way is lost."""
        self._agent.connections.discard(self)

    # --- its life ---------------------------------------------------------------------------------------------

    def _life(self) -> Steps:
        options, rng = self.node.options, self.node.rng
        answer = yield from self._ask(("join", self.generation))
        if isinstance(answer, AgentError):
            self._raise("FencedError", answer.message)
            return
        self.generation, offer = answer
        yield from self._reserve()
        if offer is not None and not (yield from self._restore(offer)):
            return
        while self.step < options.total_steps:
            yield options.step_s * rng.uniform(0.3, 1.0)
            if not (yield self._collective.arrive(self.rank, self.step + 1)):
                self._raise("RuntimeError", "connection closed by peer")
                return
            yield options.step_s * rng.uniform(0.0, 0.3)
            self.step += 1
            self.state = advance(self.state, self.rank, self.step)
            assert self.page is not None
            self.page.step = self.step
            if self.step >= self.page.capture_step or self._fresh:
                yield from self._boundary(self.page)
        if self.step > self._captured_step and self.step > 0:
            yield from self._capture(final=True)
        yield from self._ask(("leave", self.step))
        self.node.witness.rank_finished(self)
        yield rng.uniform(0, 0.05)
        self._exit(0)

    def _ask(self, message: object) -> Steps:
        self._call = Signal(self.node.clock)
        self.tell(message)
        return (yield self._call)

    def turn_to(self, agent: ModelAgent) -> None:
        """Ask another supervisor for the rank's place."""
        self._agent = agent
        self._channel = Channel(self.node.clock, agent, "message", self.node.latency_s)
        self.tell(("join", self.generation))

    def tell(self, message: object) -> None:
        """Send something to the agent."""
        self._channel.send(self._agent.received, self, message)

    def _reserve(self) -> Steps:
        self.slots = yield from self._ask(("reserve", self._size))

    def _restore(self, offer: dict[str, Any]) -> Steps:
        slot = self.slots[offer["slot"]]
        cells = []
        for part in range(PARTS):
            yield self.node.options.restore_part_s
            cells.append(slot.cells[part])
        checkpoint: CheckpointId = offer["id"]
        if slot.flipped:  # the digests of the commit tell
            error = DamagedError(f"slot {slot.number} is not what was committed")
            self.tell(e.RestoreFailed(self.rank, checkpoint, error))
            self._raise("DamagedError", error.message)
            return False
        self.node.witness.rank_restores(self, checkpoint, tuple(cells))
        assert cells[0] is not None
        self.state = self.restored_state(cells[0])
        self.step = self._captured_step = checkpoint.step
        assert self.page is not None
        self.page.step = self.step
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
        if self.step < wanted or wanted == self._handled:
            return
        self._handled = wanted
        if self.step == wanted:
            yield from self._capture(final=False)
        else:
            self.tell(e.CaptureMissed(self.rank, wanted, None))

    def _capture(self, *, final: bool) -> Steps:
        slot = self._free_slot()
        end_s = self.node.clock.now_s + FINAL_SLOT_DEADLINE_S
        while slot is None and final and self.node.clock.now_s < end_s:
            yield 0.05
            slot = self._free_slot()
        if slot is None:
            self.node.witness.no_slot(self, final=final)
            self.tell(e.CaptureMissed(self.rank, self.step, AgentError("every slot is busy")))
            return
        self.capturing = True
        for part in range(PARTS):
            self.node.witness.slot_written(slot, f"a capture of step {self.step}")
            slot.write(part, Cell(self.rank, self.step, self.state, part))
            yield self.node.options.capture_part_s * self.node.rng.uniform(0.1, 1.0)
        self.capturing = False
        assert self.page is not None
        self.page.seal(slot.number)
        self.tell(e.RankSealed(self.rank, self.step, slot.number, self._size, 0.0, {"loss": float(self.step)}, final))
        self._captured_step = self.step

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
