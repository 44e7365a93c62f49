"""What model ranks do together: an all-reduce in each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulation.clock import Signal

if TYPE_CHECKING:
    from tests.simulation.node import Node


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
