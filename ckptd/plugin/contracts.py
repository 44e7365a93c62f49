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
