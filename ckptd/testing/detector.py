"""The conformance suite of detectors."""

from __future__ import annotations

import math
import time

from ckptd.plugin import Detector
from ckptd.plugin.manager import CALL_LIMIT_S
from ckptd.types import Evidence, OomKill, RaisedException, RankExit

_LAST_SIGNAL = 64
_RAISED = RaisedException("RuntimeError", "boom", 'Traceback (most recent call last):\n  File "train.py"\n')
_LONG = RaisedException("ValueError", "first line\nsecond line\n" * 500, "Traceback\n" * 5000)
_EMPTY = RaisedException("KeyboardInterrupt", "", "")
_STRANGE = RaisedException("Fehlerä", "\x1b[31m\0\ud800 ☃", "")
_OURS = RaisedException("StateError", "too big", "", {"code": "state", "message": "too big", "hint": None})

ENDS: tuple[RankExit, ...] = (
    *(RankExit(rank=0, pid=4242, returncode=code, at_s=12.5) for code in (0, 1, 2, 3, 75, 126, 127, 130, 137, 255)),
    *(RankExit(rank=1, pid=4242, returncode=-number, at_s=12.5) for number in range(1, _LAST_SIGNAL + 1)),
    RankExit(rank=1, pid=4242, returncode=-200, at_s=12.5),  # no such signal: a foreign launcher may say anything
    RankExit(rank=3, pid=1, returncode=99_999, at_s=0.0),
    *(
        RankExit(rank=1023, pid=4242, returncode=code, at_s=12.5, exception=exception, last_lines=("one", "two"))
        for code in (0, 1, -9)
        for exception in (_RAISED, _LONG, _EMPTY, _STRANGE, _OURS)
    ),
    RankExit(rank=1, pid=4242, returncode=-6, at_s=12.5, core_dumped=True),
    *(
        RankExit(rank=1, pid=4242, returncode=-9, at_s=12.5, exception=exception, oom=oom)
        for exception in (None, _RAISED)
        for oom in (OomKill("Killed process 4242", True, "/a b", 2**26), OomKill("", False))
    ),
    RankExit(rank=2, pid=4242, returncode=1, at_s=1e9, last_lines=("CUDA error: an illegal memory access",) * 100),
    RankExit(rank=2, pid=4242, returncode=1, at_s=12.5, last_lines=("", "\x1b[0m", "\0", "ä☃\ud800")),
)
"""Ends of ranks as a launcher may report them: every exit code of note, every signal, and odd texts."""


class DetectorSuite:
    """The contract of `ckptd.plugin.Detector`: subclass it and give it a `detector` fixture.

    The agent calls a detector in its event loop, at the worst moment of a job. So it must answer fast, never raise,
    say the same about the same facts, and say it in a form that reaches logs and `ckptctl incidents` unharmed.
    """

    def test_has_a_name(self, detector: Detector) -> None:
        """A detector's name can be written in a log field."""
        assert isinstance(detector.name, str)
        assert detector.name
        assert not any(character.isspace() for character in detector.name)

    def test_never_raises(self, detector: Detector) -> None:
        """Whatever end of a rank it is shown, a detector answers with evidence or None."""
        for end in ENDS:
            claim = detector.on_exit(end)
            assert claim is None or isinstance(claim, Evidence), f"{end} made it return {claim!r}"

    def test_names_itself_and_the_rank(self, detector: Detector) -> None:
        """Evidence names the detector that gives it, and the rank that it was asked about or none."""
        for end, claim in _claims(detector):
            assert claim.detector == detector.name
            assert claim.rank in (end.rank, None)
            assert claim.kind, f"evidence about {end} is of no kind"

    def test_says_how_sure_it_is(self, detector: Detector) -> None:
        """Certainty is above 0 and at most 1: it is compared with that of other detectors."""
        for end, claim in _claims(detector):
            assert 0 < claim.certainty <= 1, f"evidence about {end} has certainty {claim.certainty}"
            assert math.isfinite(claim.at_s)

    def test_says_it_in_one_line(self, detector: Detector) -> None:
        """The summary is one line for people: it becomes the cause of an incident."""
        for end, claim in _claims(detector):
            assert claim.summary.strip(), f"evidence about {end} says nothing"
            assert len(claim.summary.splitlines()) == 1, f"evidence about {end} has more than one line"

    def test_a_clean_end_is_no_failure(self, detector: Detector) -> None:
        """A rank that ends with exit code 0 and no exception fails no job."""
        claim = detector.on_exit(RankExit(rank=0, pid=4242, returncode=0, at_s=12.5))
        assert claim is None or not claim.fatal

    def test_judges_the_same_facts_alike(self, detector: Detector) -> None:
        """Asked twice, in another order, a detector says the same: decisions can be replayed."""
        first = {end: detector.on_exit(end) for end in ENDS[:20]}
        assert {end: detector.on_exit(end) for end in reversed(ENDS[:20])} == first

    def test_is_fast(self, detector: Detector) -> None:
        """Judging every end of the table takes less than the limit for a single call."""
        begin_s = time.monotonic()
        for end in ENDS:
            detector.on_exit(end)
        assert time.monotonic() - begin_s < CALL_LIMIT_S


def _claims(detector: Detector) -> list[tuple[RankExit, Evidence]]:
    judged = [(end, detector.on_exit(end)) for end in ENDS]
    return [(end, claim) for end, claim in judged if claim is not None]
