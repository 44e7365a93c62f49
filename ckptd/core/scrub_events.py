"""What a scrub wants done (effects) and what comes of it (inputs), as values; see `core.events` for all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptd.core.restore import Source
from ckptd.errors import CkptdError


@dataclass(frozen=True, slots=True)
class Scrub:
    """Read every byte of a copy again, slowly; answered by `Scrubbed`."""

    source: Source


@dataclass(frozen=True, slots=True)
class Mend:
    """Replace what is damaged of a copy by what other tiers have; answered by `Mended`."""

    source: Source


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """A copy was read again; without `problems` and `error` it is intact."""

    source: Source
    problems: tuple[str, ...] = ()
    """What is damaged, in words."""
    error: CkptdError | None = None
    """Why nothing can be said about it now; a `NotFoundError` when it is not committed there any more."""
    size_bytes: int = 0
    """How much was read."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Mended:
    """What was damaged of a copy was replaced, but for what `problems` name."""

    source: Source
    origins: Mapping[str, str] = field(default_factory=dict)
    """Which tier each file came from that was replaced."""
    problems: tuple[str, ...] = ()
    """Of what no tier has a good copy, in words."""
    error: CkptdError | None = None
    """What went wrong where it was to be put."""
