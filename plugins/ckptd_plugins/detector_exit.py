"""The exit detector: what the end of a rank's process says about why it ended."""

from __future__ import annotations

from dataclasses import replace

from ckptd.plugin import Detector, hookimpl
from ckptd.types import Evidence, RankExit
from ckptd.units import show_signal, show_size

_COUNTED = 0.9
"""How sure a lack of memory is that was counted in the rank's cgroup: it may have hit another process there."""


class ExitDetector:
    """Reads exit codes, signals and the rank's own exception. Certain: the kernel said so."""

    name = "exit"

    def on_exit(self, end: RankExit) -> Evidence | None:
        """Return evidence unless the rank ended with exit code 0.

        What the rank itself has raised comes before the signal that ended it: Python tells of an exception when
        nothing will catch it any more, and what follows (a peer that gives up, a library that aborts in its clean-up,
        the agent's own kill) follows from that; an exit code that it was about to end with is told like that, too. A
        lack of memory comes before all of them.
        """
        if end.returncode == 0:
            return None
        if end.oom is not None:
            limit = end.oom.limit_bytes
            where = "" if limit is None else f"; its cgroup may use {show_size(limit)}"
            return self._evidence(end, "oom", f"rank {end.rank} was killed by the kernel: out of memory{where}")
        told = None if end.exception is None else end.exception.exit_code
        if told is not None:
            code = end.returncode if end.returncode > 0 else told
            claim = self._evidence(end, "exit", f"rank {end.rank} ended with exit code {code}")
            return replace(claim, returncode=code, signal=None)
        if end.exception is not None:
            first = next(iter(end.exception.message.strip().splitlines()), "")  # the rest stays with the exception
            said = f": {first}" if first else ""
            return self._evidence(end, "exception", f"rank {end.rank} raised {end.exception.type}{said}")
        if end.returncode < 0:
            core = ", core dumped" if end.core_dumped else ""
            return self._evidence(end, "signal", f"rank {end.rank} was killed by {show_signal(-end.returncode)}{core}")
        return self._evidence(end, "exit", f"rank {end.rank} ended with exit code {end.returncode}")

    def _evidence(self, end: RankExit, kind: str, summary: str) -> Evidence:
        return Evidence(
            detector=self.name,
            kind=kind,
            rank=end.rank,
            certainty=_COUNTED if end.oom is not None and not end.oom.certain else 1.0,
            summary=summary,
            at_s=end.at_s,
            signal=-end.returncode if end.returncode < 0 else None,
            returncode=end.returncode,
            exception=end.exception if kind == "exception" else None,
            told_s=None if end.exception is None else end.exception.told_s,
            facts=_facts(end),
        )


def _facts(end: RankExit) -> tuple[str, ...]:
    how = f"signal {show_signal(-end.returncode)}" if end.returncode < 0 else f"exit code {end.returncode}"
    core = "yes" if end.core_dumped else "no"
    facts = [f"rank {end.rank}, process {end.pid}: ended by {how}; core dumped: {core}"]
    if end.oom is not None:
        limit = "none" if end.oom.limit_bytes is None else f"{end.oom.limit_bytes} bytes"
        facts += [end.oom.said, f"cgroup: {end.oom.cgroup or 'unknown'}, limit: {limit}"]
    return tuple(facts)


@hookimpl
def ckptd_detectors() -> list[Detector]:
    """Register the exit detector."""
    return [ExitDetector()]
