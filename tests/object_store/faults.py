"""What the proxy may do to a request: one small class for each way in which servers, networks and people fail."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field

FOREVER_S = 3600.0


@dataclass(frozen=True)
class Answer:
    """Take the request, do not forward it, and answer with an error as S3 writes it."""

    status: int
    code: str


@dataclass(frozen=True)
class Swallow:
    """Take the request, do not forward it, and say that it went well."""


@dataclass(frozen=True)
class LoseAnswer:
    """Forward the request, and reset the connection instead of answering: it has happened and nobody knows."""


@dataclass(frozen=True)
class Reset:
    """Reset the connection after so many bytes of the body of the request or, with `answer`, of the answer's."""

    after_bytes: int = 0
    answer: bool = False


@dataclass(frozen=True)
class Truncate:
    """Close the connection politely after so many bytes of the answer's body."""

    after_bytes: int = 0


@dataclass(frozen=True)
class Stall:
    """Stand still after so many bytes of the body of the request or, with `answer`, of the answer's; then go on."""

    seconds: float = FOREVER_S
    after_bytes: int = 0
    answer: bool = False


@dataclass(frozen=True)
class Flip:
    """Change a bit of one byte of the body of the request or, with `answer`, of the answer's."""

    at: int = 0
    answer: bool = False


@dataclass(frozen=True)
class Drip:
    """Let so many bytes of a body pass in a second, of the request's or, with `answer`, of the answer's."""

    bytes_per_s: float
    answer: bool = False


Fault = Answer | Swallow | LoseAnswer | Reset | Truncate | Stall | Flip | Drip


@dataclass
class Rule:
    """Which requests a fault is for: some kinds, keys that contain a pattern, and of those from `skip` on, `times`."""

    fault: Fault
    kinds: frozenset[str]
    key: re.Pattern[str]
    skip: int
    times: float
    seen: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def hits(self) -> int:
        """How many requests it has met."""
        return int(max(0, min(self.seen - self.skip, self.times)))

    def meets(self, kind: str, key: str) -> bool:
        """Count a request that it is made for, and say whether it meets this one."""
        if self.ended.is_set() or (self.kinds and kind not in self.kinds) or not self.key.search(key):
            return False
        self.seen += 1
        return self.skip < self.seen <= self.skip + self.times

    def end(self) -> None:
        """Let everything pass from now on, what it has stalled too."""
        self.ended.set()
