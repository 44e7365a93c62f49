"""The exit detector: what the end of a rank's process says about why it ended."""

from __future__ import annotations

import signal

from ckptd.plugin import Detector, hookimpl
from ckptd.types import Evidence, RankExit


class ExitDetector:
    """Reads exit codes, signals and the rank's own exception. Certain: the kernel said so."""

    name = "exit"

    def on_exit(self, end: RankExit) -> Evidence | None:
        """Return evidence unless the rank ended with exit code 0."""
        if end.returncode == 0:
            return None
        if end.returncode < 0:
            number = -end.returncode
            return self._evidence(end, "signal", f"rank {end.rank} was killed by {_name(number)}", number)
        if end.exception is not None:
            first = next(iter(end.exception.message.strip().splitlines()), "")  # the rest stays with the exception
            said = f": {first}" if first else ""
            return self._evidence(end, "exception", f"rank {end.rank} raised {end.exception.type}{said}")
        return self._evidence(end, "exit", f"rank {end.rank} ended with exit code {end.returncode}")

    def _evidence(self, end: RankExit, kind: str, summary: str, number: int | None = None) -> Evidence:
        return Evidence(
            detector=self.name,
            kind=kind,
            rank=end.rank,
            certainty=1.0,
            summary=summary,
            at_s=end.at_s,
            signal=number,
            returncode=end.returncode,
            exception=end.exception if kind == "exception" else None,
        )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"  # a real-time signal has no name


@hookimpl
def ckptd_detectors() -> list[Detector]:
    """Register the exit detector."""
    return [ExitDetector()]
