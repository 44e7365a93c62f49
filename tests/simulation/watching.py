"""What the model agent does about ranks that live: looks at their pages, and gathers evidence when it is asked to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptd.core.policy.hang import HangPolicy, Sample
from ckptd.core.watch_events import Gather, Gathered, Watched

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent

PATIENCE = HangPolicy(floor_s=5.0, ceiling_s=150.0, first_s=30.0)
"""A model rank waits for a slot for up to 120 s at its end, and for less at any other time."""


def look(agent: ModelAgent) -> None:
    """Tell the machine what every page says now."""
    now_s = agent.node.clock.now_s
    samples = tuple(
        Sample(process.rank, page.step, round(page.beat_s * 1e9), page.phase, now_s)
        for process in agent.ranks.values()
        if (page := process.page) is not None
    )
    agent.feed(Watched(now_s, samples))


def gather(agent: ModelAgent, effect: Gather) -> None:
    """Gather evidence, which may take longer than anybody waits for it."""
    rng = agent.node.rng
    stuck = [process.rank for process in agent.ranks.values() if process.stuck and process.alive]
    answer = Gathered(effect.incident, "folder", dict.fromkeys(stuck, "does nothing"), stuck[0] if stuck else None)
    agent.node.clock.after(rng.choice((0.2, 2.0, 8.0)) * rng.random(), agent, "evidence", agent.feed, answer)
