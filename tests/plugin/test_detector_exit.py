"""The exit detector: it keeps the contract of detectors, and says in words how a rank ended."""

from __future__ import annotations

import pytest

from ckptd.testing import DetectorSuite
from ckptd.types import OomKill, RaisedException, RankExit
from ckptd_plugins.detector_exit import ExitDetector


class TestExitDetector(DetectorSuite):
    """The detector that ships keeps the contract."""

    @pytest.fixture
    def detector(self) -> ExitDetector:
        """The exit detector."""
        return ExitDetector()


_RAISED = RaisedException("RuntimeError", "shapes differ\n  at layer 3", "Traceback ...")


@pytest.mark.parametrize(
    ("returncode", "exception", "kind", "signal", "summary"),
    [
        (-9, None, "signal", 9, "rank 3 was killed by SIGKILL"),
        (-11, None, "signal", 11, "rank 3 was killed by SIGSEGV"),
        (-34, None, "signal", 34, "rank 3 was killed by SIGRTMIN"),
        (-35, None, "signal", 35, "rank 3 was killed by signal 35"),
        (-200, None, "signal", 200, "rank 3 was killed by signal 200"),
        (-9, _RAISED, "exception", 9, "rank 3 raised RuntimeError: shapes differ"),
        (-6, _RAISED, "exception", 6, "rank 3 raised RuntimeError: shapes differ"),
        (1, _RAISED, "exception", None, "rank 3 raised RuntimeError: shapes differ"),
        (7, _RAISED, "exception", None, "rank 3 raised RuntimeError: shapes differ"),
        (1, RaisedException("KeyboardInterrupt", "", ""), "exception", None, "rank 3 raised KeyboardInterrupt"),
        (1, RaisedException("ValueError", "\n\n", ""), "exception", None, "rank 3 raised ValueError"),
        (3, RaisedException("SystemExit", "3", ""), "exit", None, "rank 3 ended with exit code 3"),
        (-9, RaisedException("SystemExit", "3", ""), "exit", None, "rank 3 ended with exit code 3"),
        (-9, RaisedException("SystemExit", "no code", ""), "exception", 9, "rank 3 raised SystemExit: no code"),
        (1, None, "exit", None, "rank 3 ended with exit code 1"),
        (137, None, "exit", None, "rank 3 ended with exit code 137"),
    ],
)
def test_what_it_says(
    returncode: int, exception: RaisedException | None, kind: str, signal: int | None, summary: str
) -> None:
    """Signals by name, exceptions by type and first line, exit codes by number: each with full certainty."""
    claim = ExitDetector().on_exit(RankExit(3, 7, returncode, 12.5, exception))
    assert claim is not None
    assert (claim.kind, claim.signal, claim.summary) == (kind, signal, summary)
    code = 3 if kind == "exit" and returncode < 0 else returncode  # what it was about to end with
    assert (claim.detector, claim.rank, claim.returncode, claim.at_s) == ("exit", 3, code, 12.5)
    assert (claim.certainty, claim.fatal) == (1.0, True)
    assert claim.exception == (exception if kind == "exception" else None)


@pytest.mark.parametrize(
    ("end", "kind", "certainty", "summary"),
    [
        (RankExit(3, 7, -11, 1.0, core_dumped=True), "signal", 1.0, "rank 3 was killed by SIGSEGV, core dumped"),
        (
            RankExit(3, 7, -9, 1.0, oom=OomKill("Killed process 7 (python)", True, "/job", 64 * 2**20)),
            "oom",
            1.0,
            "rank 3 was killed by the kernel: out of memory; its cgroup may use 64.0 MiB",
        ),
        (
            RankExit(3, 7, -9, 1.0, _RAISED, oom=OomKill("counted", False, "/job", None)),
            "oom",
            0.9,
            "rank 3 was killed by the kernel: out of memory",
        ),
    ],
)
def test_what_the_kernel_says_besides(end: RankExit, kind: str, certainty: float, summary: str) -> None:
    """A core file and a lack of memory are in the summary, and a kill that was only counted is less than certain."""
    claim = ExitDetector().on_exit(end)
    assert claim is not None
    assert (claim.kind, claim.certainty, claim.summary) == (kind, certainty, summary)
    if end.oom is not None:
        assert end.oom.said in claim.facts
        assert any("/job" in fact for fact in claim.facts)
    assert claim.facts[0].startswith("rank 3, process 7: ended by signal SIG")


def test_a_clean_end_is_none() -> None:
    """Exit code 0 is no failure."""
    assert ExitDetector().on_exit(RankExit(0, 7, 0, 12.5)) is None


def test_the_same_failure_has_the_same_signature() -> None:
    """What the restart policy counts: the same exception or signal, whichever rank, whenever."""
    judge = ExitDetector().on_exit
    first, again = judge(RankExit(0, 7, 1, 1.0, _RAISED)), judge(RankExit(5, 8, 1, 99.0, _RAISED))
    other, killed = judge(RankExit(0, 7, 1, 1.0)), judge(RankExit(0, 7, -9, 1.0))
    assert first is not None
    assert again is not None
    assert other is not None
    assert killed is not None
    assert first.signature == again.signature
    assert len({first.signature, other.signature, killed.signature}) == 3
