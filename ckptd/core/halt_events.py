"""When a job is to stop by itself (an input), and that its ranks may leave (an effect); see `core.events`."""

from __future__ import annotations

from dataclasses import dataclass

from ckptd.core.policy.halt import Conditions


@dataclass(frozen=True, slots=True)
class HaltWanted:
    """From now on these are the conditions upon which the job stops by itself."""

    conditions: Conditions


@dataclass(frozen=True, slots=True)
class Leave:
    """Tell every rank to leave: its last shard is sealed, and so are all others."""
