"""The look at the node before a generation starts: what is asked for (effect) and what was found (input), as values."""

from __future__ import annotations

from dataclasses import dataclass

from ckptd.core.policy.gate import Unfit


@dataclass(frozen=True, slots=True)
class CheckNode:
    """See whether the node is fit for the job's ranks; answered by `NodeChecked`."""


@dataclass(frozen=True, slots=True)
class NodeChecked:
    """The checks are done; `unfit` is what they found wrong, nothing when the node is fit."""

    unfit: tuple[Unfit, ...] = ()
