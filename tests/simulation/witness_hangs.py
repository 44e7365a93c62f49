"""The part of the witness that knows which ranks hang, and judges who is called hung."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptd.core import events as e
from ckptd.core.job_states import JobState
from ckptd.core.watch_events import Gather
from tests.simulation.memory import PARTS
from tests.simulation.watching import PATIENCE

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent
    from tests.simulation.node import Node
    from tests.simulation.ranks import RankProcess

LONGEST_S = 2 * (PATIENCE.ceiling_s + PATIENCE.first_s) + 60.0
"""No rank may hang for longer while an agent is there: through what may take longest, and a stop of the job."""


_KNOWN_AFTER_S = 3.0
"""After so much training the agent has seen enough steps to know how long one takes."""


class HangWitness:
    """Knows the truth about every rank that was made to hang."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._since_s: dict[RankProcess, float] = {}
        self._over: list[tuple[float, float]] = []
        """Hangs that have ended by themselves: when, and how long they were."""
        self._look_at_s = 0.0
        options = node.options
        self._sign_s = options.step_s + PARTS * options.capture_part_s + options.tick_s
        """A rank that goes on shows it after so long at the latest."""

    def stuck(self, process: RankProcess) -> None:
        """Note that a rank hangs from now on."""
        self._since_s[process] = self._node.clock.now_s

    def goes_on(self, process: RankProcess) -> None:
        """Note that it does not any more."""
        since_s = self._since_s.pop(process, None)
        if since_s is not None:
            self._over.append((self._node.clock.now_s, self._node.clock.now_s - since_s))

    def carried_out(self, effect: e.Effect, agent: ModelAgent) -> None:
        """Judge a verdict: somebody hangs, for as long as the floor at least, and no longer than has to be."""
        if not isinstance(effect, Gather) or effect.evidence.kind != "hang":
            return
        node = self._node
        ages = {process: node.clock.now_s - since for process, since in self._since_s.items() if process.alive}
        # Whoever waited for one that hung for a moment may hang itself before it comes to its next step.
        before_s = sum(length_s for end_s, length_s in self._over if end_s > node.clock.now_s - PATIENCE.floor_s - 1.0)
        guilty = [process for process, age_s in ages.items() if age_s + before_s > PATIENCE.floor_s - 1.0]
        ended_s = max((end_s for end_s, _ in self._over), default=0.0)
        if not guilty and before_s > PATIENCE.floor_s - 1.0 and ended_s > node.clock.now_s - self._sign_s:
            return  # it goes on since a moment ago, and has had no time to show it
        node.witness.require(bool(guilty), f"nobody hangs: {effect.evidence.summary}")
        node.witness.seen["hang found"] += 1
        phases = [process.page.phase for process in agent.ranks.values() if process.page is not None]
        (first, *others) = guilty
        # The steps after a first one that took long may take long as well.
        known = first.own_steps > 3 and first.own_steps * node.options.step_s > _KNOWN_AFTER_S
        usual = known and not others and all(phase == "training" for phase in phases)
        seen_from_s = agent.began_s + _KNOWN_AFTER_S * bool(node.witness.takeovers.count)
        if usual and seen_from_s < self._since_s[first] and len(phases) == node.options.world_size:
            # A hang that has passed is a step that took long, and three times the longest is not a hang yet.
            passed_s = max((length_s for end_s, length_s in self._over if end_s > agent.began_s), default=0.0)
            limit_s = max(PATIENCE.floor_s, 15 * node.options.step_s, 3 * passed_s)
            node.witness.require(ages[first] < 2 * limit_s, f"{first} was found after {ages[first]:.1f} s")
            node.witness.seen["hang found soon"] += 1

    def after_event(self) -> None:
        """Check now and then that nobody hangs for ever."""
        now_s = self._node.clock.now_s
        if not self._since_s or now_s < self._look_at_s:
            return
        self._look_at_s = now_s + 1.0
        self._since_s = {process: since for process, since in self._since_s.items() if process.alive}
        if self._node.agent.machine.state is JobState.PENDING:
            return  # an attached rank that was never let in is its launcher's
        for process, since_s in self._since_s.items():
            self._node.witness.require(now_s - since_s < LONGEST_S, f"{process} hangs for ever")
