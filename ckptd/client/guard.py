"""The guard between ckptd and training: faults are counted, said once, and never raised into a training step.

One of the two places with a broad `except`: whatever goes wrong in here, the user's training goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from ckptd.errors import AgentError, CkptdError

FAULTS_BEFORE_OPEN = 3
Result = TypeVar("Result")


def say(text: str) -> None:
    """Print one line for people; the client has no logger, since importing one would cost every rank."""
    with suppress(Exception):  # stderr may be closed or its disk full, and training goes on all the same
        print(f"ckptd: {text}", file=sys.stderr, flush=True)  # noqa: T201


def as_ckptd_error(error: BaseException) -> CkptdError:
    """Return any error in the form that can be shown in a line and told to the agent."""
    if isinstance(error, CkptdError):
        return error
    try:
        text = str(error)
    except Exception as unread:  # noqa: BLE001 - it is users' code as well
        text = f"its text can't be read ({type(unread).__name__})"
    return CkptdError(f"{type(error).__name__}: {text}")


def as_number(value: Any) -> float | None:
    """Return what was reported as a number, None when it is none: reading it is code of the user's."""
    try:
        return float(value)
    except Exception:  # noqa: BLE001 - the promise of this module
        return None


def attempt(what: str, work: Callable[..., object], *arguments: Any) -> None:
    """Call `work`, and only say what it fails with: for the way out, which has to be gone to its end."""
    try:
        work(*arguments)
    except Exception as error:  # noqa: BLE001 - the promise of this module
        say(f"{what} failed: {as_ckptd_error(error)}")


class AgentAwayError(AgentError):
    """What can't be done until another agent is there. It is no fault of anybody's, and counts as none."""


class Guard:
    """Runs ckptd's own work inside training.

    After `FAULTS_BEFORE_OPEN` faults in a row of one kind of work the breaker opens: `on_open` is called once and
    nothing is tried any more. Work that returns False had nothing to do, which ends no such row. With `strict`, a fault
    is raised instead.
    """

    def __init__(self, *, strict: bool, on_open: Callable[[], None]) -> None:
        self.strict = strict
        self.open = False
        self._faults: dict[str, int] = {}
        self._on_open = on_open

    def run(self, what: str, work: Callable[..., Result], *arguments: Any) -> Result | None:
        """Call `work` and return its result, or None when it failed or the breaker is open."""
        if self.open:
            return None
        try:
            result = work(*arguments)
        except AgentAwayError as error:
            say(f"{what} has to wait: {error}")
            return None
        except Exception as error:  # the promise of this module
            if self.strict:
                raise
            self._fault(what, error)
            return None
        if result is not False:
            self._faults.pop(what, None)
        return result

    def aside(self, what: str, work: Callable[..., Result], *arguments: Any) -> Result | None:
        """Call work that no checkpoint depends on: what it fails with opens no breaker, and is said a few times."""
        try:
            return work(*arguments)
        except Exception as error:  # the promise of this module
            if self.strict:
                raise
            faults = self._faults[what] = self._faults.get(what, 0) + 1
            if faults <= FAULTS_BEFORE_OPEN:
                say(f"{what} failed: {as_ckptd_error(error)}")
            return None

    def _fault(self, what: str, error: Exception) -> None:
        faults = self._faults[what] = self._faults.get(what, 0) + 1
        say(f"{what} failed: {as_ckptd_error(error)}")  # the error itself is not kept: its traceback may hold slots
        if faults >= FAULTS_BEFORE_OPEN:
            self.trip(f"{faults} faults in a row")

    def trip(self, why: str) -> None:
        """Open the breaker, because of faults or because trying again is of no use."""
        if not self.open:
            self.open = True
            say(f"{why}: training goes on UNPROTECTED, without further checkpoints")
            self._on_open()
