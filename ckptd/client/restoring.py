"""Restore: from the agent's offer to the user's objects."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ckptd.client.framework import Binding
from ckptd.client.garbage import no_collections
from ckptd.client.session import MAX_FILES, Session
from ckptd.errors import CkptdError, DamagedError, StateError, StoreError
from ckptd.protocol import messages as m
from ckptd.protocol.page import Phase, Word


class Restored(NamedTuple):
    """What a run began with: which checkpoint, from where, and how long filling the objects took."""

    generation: int
    step: int
    tier: str
    seconds: float


class Offer:
    """The `OfferedCheckpoint` of a session: files are opened when they are asked for, and closed all together."""

    def __init__(self, session: Session, *, in_memory: bool) -> None:
        """Take over the session's document: a large one takes megabytes, and nobody needs it again."""
        self.document: Mapping[str, Any] = session.document
        session.document = {}
        self.in_memory = in_memory
        self._session = session
        self._descriptors: dict[str, int] = {}

    def open(self, files: Sequence[str]) -> Mapping[str, int]:
        """Return descriptors by file; raises what the agent refuses a file with."""
        missing = [file for file in dict.fromkeys(files) if file not in self._descriptors]
        for begin in range(0, len(missing), MAX_FILES):
            batch = missing[begin : begin + MAX_FILES]
            self._descriptors.update(zip(batch, self._session.open(batch), strict=True))
        return {file: self._descriptors[file] for file in files}

    def close(self) -> None:
        """Close every descriptor."""
        descriptors, self._descriptors = self._descriptors, {}
        for descriptor in descriptors.values():
            os.close(descriptor)


def restore(session: Session, binding: Binding) -> Restored | None:
    """Fill the bound objects from what the session was offered; None when it was offered nothing.

    An offer that can't be used is told to the agent, and raised as it is.
    """
    offer = session.offer
    if offer is None:
        return None
    generation, step, tier = int(offer["generation"]), int(offer["step"]), str(offer["tier"])
    begin_s = time.monotonic()
    session.page.words[Word.PHASE] = Phase.RESTORING
    offered = Offer(session, in_memory=bool(offer["in_memory"]))
    try:
        with no_collections():  # all the objects of a plan live to its end
            binding.restore(offered)
    except (StateError, DamagedError, StoreError) as error:
        with contextlib.suppress(CkptdError):
            session.tell(m.RestoreFailed(generation, step, error.to_json()))
        raise
    finally:
        offered.close()
    return Restored(generation, step, tier, time.monotonic() - begin_s)
