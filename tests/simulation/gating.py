"""A model agent's look at its node, which may be unfit for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptd.core.gate_events import NodeChecked
from ckptd.core.policy.gate import Unfit
from tests.simulation.clock import Steps

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent


def look(agent: ModelAgent) -> Steps:
    """Ask every check, which takes a moment, or a second when one hangs."""
    node = agent.node
    yield node.rng.choice((0.0, 0.002, 0.002, 1.0)) * node.rng.random()
    unfit = node.faults.active and node.rng.random() < node.options.unfit_chance
    agent.feed(NodeChecked((Unfit("model", "the node is unfit"),) if unfit else ()))
