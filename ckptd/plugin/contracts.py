"""What plugins hand over: plain objects that the agent calls itself, each inside its own limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ckptd.storage.tier import Tier
from ckptd.types import Evidence, RankExit


@dataclass(frozen=True, slots=True)
class TierFactory:
    """Opens tiers for URL schemes; the scheme "" stands for a plain path."""

    name: str
    schemes: tuple[str, ...]
    open: Callable[[str, Mapping[str, Any]], Tier]
    """Called with the URL and the options that a job gives for it; raises `ConfigError` for those it does not know."""


@dataclass(frozen=True, slots=True)
class FrameworkSpec:
    """Names a framework's adapter for the ranks, without importing it: the agent must stay light.

    A rank whose script has imported `trigger` imports `target` ("module:attribute") and calls it without arguments
    to get a `ckptd.client.framework.Framework`.
    """

    name: str
    trigger: str
    target: str
    preload: tuple[str, ...] = ()
    """Modules that a launcher which preloads `trigger` should preload too, because nearly every script needs them."""


@dataclass(frozen=True, slots=True)
class FormatSpec:
    """Names a format that checkpoints are exported to or imported from, without importing what that needs.

    Targets are "module:attribute" and imported when they are used; an empty one says that the format can't do that.
    """

    name: str
    about: str
    """What it is, in a few words."""
    exporter: str = ""
    """An `Exporter`."""
    importer: str = ""
    """An `Importer`."""
    signs: tuple[str, ...] = ()
    """Patterns of names: a file of such a name is of this format, and so is a folder that has such a file."""
    splits: bool = False
    """Whether the exporter heeds how much may go into one file."""
    extra: str = ""
    """The extra of ckptd that brings what the targets import."""


class Detector(Protocol):
    """Turns observations into evidence. Pure, fast, and never blocking: it runs in the agent's loop."""

    @property
    def name(self) -> str:
        """How evidence and logs name it."""
        ...

    def on_exit(self, end: RankExit) -> Evidence | None:
        """Judge the end of a rank's process; None says that this end is no failure."""
        ...


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What is about to start on this node, as far as a check of the node may want to know."""

    job: str
    ranks: int
    """How many are started here."""
    folders: tuple[str, ...]
    """Where the job's first tier writes, the first of several disks first; empty when that is no folder."""
    env: Mapping[str, str]
    """The environment that the ranks get, but for what differs between them."""
    memory_bytes: int = 0
    """What must be reserved for slots, going by what the job had before; 0 when that is not known, or all is there."""
    memory_left_bytes: int = 0
    """What can be reserved."""
    restarts: bool = False
    """Whether the job has run here already, so that a full disk has checkpoints of its own to let go of."""


class NodeCheck(Protocol):
    """Says whether this node is fit for ranks. Called in a thread, beside what a start waits for anyway.

    One that raises or overruns a second holds nothing up, is reported, and after the third time is not called any
    more: a broken check must not keep a job from running.
    """

    @property
    def name(self) -> str:
        """How logs and status name it: one word."""
        ...

    def check(self, plan: NodePlan) -> str | None:
        """Return in one line why nothing should start here now, None when the node is fit."""
        ...
