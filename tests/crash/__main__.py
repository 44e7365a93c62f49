"""The whole matrix: `python -m tests.crash` harms an agent at every call of every phase.

--phase NAME ...     these phases only: fresh resume upload upload-disk fetch fetch-disk
--what HARM ...      these harms only: "kill before" "kill after" EIO ENOSPC EROFS short "EIO for long"
--first N --last N   these calls only
--every K            every K-th call only
--jobs J             so many cases at once (default: one per core and one more, since cases mostly wait)
--keep FOLDER        work there, and keep what went wrong
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from tests.crash.calls import MUTATING, Harm
from tests.crash.matrix import ERRORS, KILLS, PHASES, Bench, Case, Verdict, harm, run_case, sweep
from tests.object_store import server

BEYOND = 10
"""So many calls more than a quiet run had: runs differ a little."""


def call_kind(met: str) -> str:
    """Return a call without what differs from run to run."""
    met = re.sub(r"/\S*/(?=[^/\s]+/g?\d|[^/\s]*(\s|$))", "", met)
    return re.sub(r"[0-9a-f]{12,}|\d+", "#", met)


class Tally:
    """What has come of all cases."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rows: dict[tuple[str, str], Counter[str]] = {}
        self.seconds: list[float] = []
        self.kinds: dict[str, set[str]] = {}
        self.bad = 0

    def take(self, verdict: Verdict, seconds: float) -> None:
        """Take in a verdict; say at once what is wrong with it."""
        case = verdict.case
        with self.lock:
            row = self.rows.setdefault((case.phase.name, case.harm.name), Counter())
            row["cases"] += 1
            row["met"] += verdict.was_met
            row["wrong"] += bool(verdict.problems)
            row["garbage"] += bool(verdict.garbage)
            self.seconds.append(seconds)
            if verdict.was_met:
                self.kinds.setdefault(case.phase.name, set()).add(call_kind(verdict.met))
            for problem in verdict.problems:
                print(f"WRONG: {case}: {verdict.met}\n  {problem}", flush=True)
            for left in verdict.garbage:
                print(f"GARBAGE: {case}: {verdict.met}\n  {left}", flush=True)
            self.bad += bool(verdict.problems or verdict.garbage)

    def show(self, wall_s: float) -> None:
        """Print the figures."""
        print("\n| phase | harm | cases | met | wrong | with garbage |\n| --- | --- | --- | --- | --- | --- |")
        for (phase, what), row in self.rows.items():
            print(f"| {phase} | {what} | {row['cases']} | {row['met']} | {row['wrong']} | {row['garbage']} |")
        kinds = ", ".join(f"{phase} {len(kinds)}" for phase, kinds in self.kinds.items())
        middle = sorted(self.seconds)[len(self.seconds) // 2] if self.seconds else 0
        print(f"\nkinds of calls met: {kinds}")
        print(f"{len(self.seconds)} cases in {wall_s:.0f} s, {middle:.2f} s each (median); {self.bad} not as promised")


def all_cases(options: argparse.Namespace, bench: Bench) -> list[Case]:
    """Return the cases that are asked for; a quiet run of each phase tells how many calls there are."""
    found: list[Case] = []
    for name in options.phase:
        phase = PHASES[name]
        quiet = [run_case(bench, Case(phase, Harm(only=only))) for only in ((), MUTATING)]
        counts = [verdict.count for verdict in quiet]
        print(f"{name}: {counts[0]} {'requests' if phase.at_requests else f'calls, {counts[1]} change something'}")
        for problem in [item for verdict in quiet for item in (*verdict.problems, *verdict.garbage)]:
            print(f"without any harm: {problem}", flush=True)
        for what in phase.harms:
            if not options.what or what in options.what:
                last = options.last or counts[bool(harm(phase, 1, what).only)] + BEYOND
                found += [Case(phase, harm(phase, at, what)) for at in range(options.first, last + 1, options.every)]
    return found


def main() -> int:
    """Run the campaign; 1 when anything was not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", nargs="+", default=list(PHASES), choices=list(PHASES))
    parser.add_argument("--what", nargs="+", default=[], choices=[*KILLS, *ERRORS])
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--last", type=int, default=0)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=(os.cpu_count() or 1) + 1)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    ending = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # the cases under way are brought to their end
        signal.signal(number, lambda *_: ending.set())
    folder = options.keep or Path(tempfile.mkdtemp(prefix="ckptd-crash-"))
    needs_bucket = any(PHASES[name].has_bucket for name in options.phase)
    s3 = server.start() if needs_bucket else None
    benches: list[Bench] = []
    tally, begin_s = Tally(), time.monotonic()
    try:
        benches += [Bench(folder / f"bench-{number}", s3) for number in range(options.jobs)]
        cases = iter(all_cases(options, benches[0]))
        lock = threading.Lock()

        def take() -> Case | None:
            with lock:
                return None if ending.is_set() else next(cases, None)

        sweep(benches, take, tally.take)
    finally:
        for bench in benches:
            bench.close()
        if s3 is not None:
            s3.stop()
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    tally.show(time.monotonic() - begin_s)
    return 1 if tally.bad else 0


if __name__ == "__main__":
    sys.exit(main())
