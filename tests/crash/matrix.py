"""The cases of the matrix, and what each has to prove.

A case is a phase, the number of a call, and what happens there. Whatever it is, afterwards every checkpoint is whole,
nothing was lost before something newer was there, the same command goes on to the same end, and no garbage is left.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ckptd.errors import JobFailedError
from tests.crash.bucket import Bucket
from tests.crash.calls import MUTATING, Harm
from tests.crash.gate import Gate, Request
from tests.crash.judge import Found, Witness, inspect
from tests.crash.world import JOB, Forkserver, Outcome, World
from tests.object_store.server import Server

KILLS = ("kill before", "kill after")
ERRORS = ("EIO", "ENOSPC", "EROFS", "short", "EIO for long")
_LONG = 8
_AT_ALL_CALLS = ("kill before", "EIO")
"""What can happen at a call that only reads; all else is for those that change the disk."""
FIRST_STEPS, LAST_STEPS = 66, 118
_HOUR_S = 3600.0
_DAY_S = 86400.0
_CLEAN_CODES = (0, 4, 5, 13, 14)
"""Done, or an error of the store in one line."""


@dataclass(frozen=True)
class Phase:
    """What the agent does when it is met."""

    name: str
    steps: int
    begins_with: str | None = None
    """The template that its folder is a copy of."""
    has_bucket: bool = False
    at_requests: bool = False
    """Whether requests to the bucket are counted instead of calls to the file system."""
    harms: tuple[str, ...] = KILLS


PHASES = {
    phase.name: phase
    for phase in (
        Phase("fresh", FIRST_STEPS, harms=(*KILLS, *ERRORS)),
        Phase("resume", LAST_STEPS, "killed"),
        Phase("upload", FIRST_STEPS, has_bucket=True, at_requests=True),
        Phase("upload-disk", FIRST_STEPS, has_bucket=True, harms=KILLS[:1]),
        Phase("fetch", LAST_STEPS, "uploaded", has_bucket=True, at_requests=True),
        Phase("fetch-disk", LAST_STEPS, "uploaded", has_bucket=True, harms=KILLS[:1]),
    )
}


def harm(phase: Phase, at: int, what: str) -> Harm:
    """Return what happens at a call, of those at which it makes a difference."""
    only = () if phase.at_requests or what in _AT_ALL_CALLS else MUTATING
    if what == "EIO for long":
        return Harm(at, "EIO", times=_LONG, only=only)
    return Harm(at, what, only=only)


@dataclass(frozen=True)
class Case:
    """One cell of the matrix."""

    phase: Phase
    harm: Harm

    def __str__(self) -> str:
        return f"{self.phase.name}, {self.harm.name} at {self.harm.at}"


@dataclass
class Verdict:
    """What came of a case; `was_met` is False when the run had fewer calls."""

    case: Case
    was_met: bool
    met: str = ""
    """The call that was met."""
    count: int = 0
    problems: list[str] = field(default_factory=list)
    garbage: list[str] = field(default_factory=list)


class Bench:
    """What the cases of one thread share: a fork server, a gate before the S3 server, and templates."""

    def __init__(self, folder: Path, s3: Server | None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.server = Forkserver(folder / "plugins")
        self._s3 = s3
        self.gate = None if s3 is None else Gate(s3.endpoint)
        self._bucket_name = "" if s3 is None else s3.make_bucket()
        self._templates: dict[str, Path] = {}

    def close(self) -> None:
        """End what was started."""
        self.server.close()
        if self.gate is not None:
            self.gate.close()

    def template(self, name: str) -> Path:
        """Return a folder to begin with, made when it is first asked for: of a job that "finished", was "killed" in the
        middle of things, or has "uploaded" everything and lost its disk."""
        if name not in self._templates:
            path = self.folder / f"template-{name}"
            place = Place(self, path, Phase(name, FIRST_STEPS, has_bucket=name == "uploaded"))
            outcome = place.run(Harm(_AFTER_THREE, "kill after", only=("link",)) if name == "killed" else Harm())
            assert outcome.code == (-9 if name == "killed" else 0), outcome.output
            if place.bucket is not None:
                place.bucket.download(path / "bucket")
                place.bucket.remove()
                shutil.rmtree(place.world.store)
            place.world.until_empty()
            self._templates[name] = path
        return self._templates[name]

    def bucket(self, prefix: str) -> Bucket:
        """Return a place of its own in the bucket."""
        assert self._s3 is not None
        return Bucket(self._s3, self._bucket_name, prefix)


_AFTER_THREE = 5
"""The record of the generation and three manifests are linked before; the fourth is committed when it is killed."""


class Place:
    """The world of a case, with its bucket if it has one."""

    def __init__(self, bench: Bench, folder: Path, phase: Phase) -> None:
        self.bench, self.phase = bench, phase
        self.requests: list[Request] = []
        """What the last run has asked the bucket for."""
        if phase.begins_with is not None:
            shutil.copytree(bench.template(phase.begins_with), folder, ignore=shutil.ignore_patterns("*.sock"))
        self.world = World(folder, bench.server)
        self.let_time_pass()
        self.bucket: Bucket | None = None
        self.mirror = folder / "bucket"
        """What the bucket holds, as files."""
        if phase.has_bucket:
            assert bench.gate is not None
            self.bucket = bench.bucket(os.urandom(6).hex())
            self.bucket.fill(self.mirror)
            self.world.stores.append(self.bucket.url)
            self.world.environ |= {**self.bucket.server.environ, "AWS_ENDPOINT_URL": bench.gate.endpoint}

    def run(self, harm: Harm) -> Outcome:
        """Run the job to its end, with harm to it."""
        gate = self.bench.gate if self.phase.has_bucket else None
        at_calls, at_requests = (Harm(), harm) if self.phase.at_requests else (harm, Harm())
        if gate is not None:
            gate.disarm()
        pid = self.world.start(self.world.command(self.phase.steps), at_calls)
        if gate is not None:
            gate.arm(pid, at_requests)
        outcome = self.world.wait()
        self.requests = [] if gate is None else gate.calm()
        return outcome

    def let_time_pass(self) -> None:
        """Have everything on the disk be an hour older: people do not restart within the second."""
        for path in self.world.store.rglob("*"):
            before = path.lstat()
            os.utime(path, (before.st_atime - _HOUR_S, before.st_mtime - _HOUR_S), follow_symlinks=False)

    def places(self) -> list[Path]:
        """Return the job's folder on every tier, that of the bucket brought here."""
        if self.bucket is None:
            return [self.world.job]
        shutil.rmtree(self.mirror, ignore_errors=True)
        self.bucket.download(self.mirror)
        return [self.world.job, self.mirror / JOB]

    def close(self) -> None:
        """Remove everything."""
        if self.bucket is not None:
            self.bucket.remove()
        self.world.remove()


def run_case(bench: Bench, case: Case) -> Verdict:
    """Run a case in a place of its own; what is wrong is in the verdict, and its folder stays then."""
    folder = bench.folder / f"{case.phase.name}-{case.harm.name.replace(' ', '-')}-{case.harm.at}"
    verdict = Verdict(case, False)
    place: Place | None = None
    try:
        place = Place(bench, folder, case.phase)
        _run_case(place, case, verdict)
        if not verdict.problems and not verdict.garbage:
            place.close()
    except Exception as error:  # of whatever kind: the case has not shown what it has to show
        verdict.problems.append(f"{type(error).__name__}: {error}")
    if place is not None and (verdict.problems or verdict.garbage):
        place.world.end()
    return verdict


def _run_case(place: Place, case: Case, verdict: Verdict) -> None:
    steps = case.phase.steps
    before = [inspect(job) for job in place.places()]
    witnesses = [Witness(job, found) for job, found in zip(place.places(), before, strict=True)]
    first = place.run(case.harm)
    _note(place, case, first, verdict)
    after = _look(place, witnesses, first, verdict, "after the harm")
    newest = max(found.newest for found in before)
    if max(found.newest for found in after) < newest:
        verdict.problems.append(f"{newest} was the newest, and {[found.newest for found in after]} are left")
    if verdict.was_met and case.harm.what in KILLS and first.code != -9:
        verdict.problems.append(f"killed, and it ended with {first.code}")
    clean = _CLEAN_CODES if case.harm.times == 1 else (*_CLEAN_CODES, JobFailedError.exit_code)
    if case.harm.name in ERRORS and (first.code not in clean or "Traceback" in first.output):
        verdict.problems.append(f"it ended with {first.code}:\n{first.output[-3000:]}")
    if first.code != 0:
        place.let_time_pass()
    second = first if first.code == 0 else place.run(Harm())
    if second.code != 0:
        verdict.problems.append(f"the next run ended with {second.code}:\n{second.output[-3000:]}")
        return
    if second is not first:
        after = _look(place, witnesses, second, verdict, "at the end")
    for found in after:
        if found.newest[1] != steps:
            verdict.problems.append(f"the newest at the end is {found.newest}, not step {steps}")
    _collect(place, verdict)
    if not place.world.ended_right(steps):
        verdict.problems.append("the ranks ended with another state")
    for store in place.world.stores:
        seen = place.world.ctl("verify", JOB, "--all", "--store", store)
        if seen.code != 0:
            verdict.problems.append(f"verify of {store} ended with {seen.code}:\n{seen.output[-2000:]}")
    place.world.until_empty()


def _collect(place: Place, verdict: Verdict) -> None:
    """Note what is left after the next collection, which is made two days later, and in a bucket after another two.

    Younger garbage there may be somebody's work, and what the first one removes can be undone for a while.
    """
    for number, store in enumerate(place.world.stores):
        for days in (2, 4) if number else (2,):
            pruned = place.world.ctl("prune", JOB, "--store", store, "--keep-last", "2", later_s=days * _DAY_S)
            if pruned.code != 0:
                verdict.problems.append(f"prune of {store} ended with {pruned.code}:\n{pruned.output[-2000:]}")
    for job in place.places():
        found = inspect(job)
        verdict.problems += [f"after a prune: {problem}" for problem in found.problems]
        verdict.garbage += found.garbage
    if place.bucket is not None:
        verdict.garbage += [f"open upload {key}" for key in place.bucket.open_uploads()]


def _note(place: Place, case: Case, outcome: Outcome, verdict: Verdict) -> None:
    if case.phase.at_requests:
        verdict.count = len(place.requests)
        verdict.was_met = outcome.code == -9
        verdict.met = str(place.requests[-1]) if place.requests else ""
        return
    verdict.count = outcome.count
    met = next((line for line in outcome.calls if case.harm.hits(line["n"])), None)
    verdict.was_met = met is not None
    if met is not None:
        verdict.met = f"{met['call']} {' '.join(str(path) for path in met['paths'])}"


def _look(place: Place, witnesses: list[Witness], outcome: Outcome, verdict: Verdict, when: str) -> list[Found]:
    jobs = place.places()
    witnesses[0].follow(outcome.calls)
    if place.bucket is not None:
        witnesses[1].follow(place.bucket.calls(place.requests, place.mirror))
    found = [inspect(job) for job in jobs]
    for one, witness in zip(found, witnesses, strict=True):
        verdict.problems += [f"{when}: {problem}" for problem in (*one.problems, *witness.problems)]
        witness.problems.clear()
        if witness.committed != sorted(one.needs):
            verdict.problems.append(f"{when}: {sorted(one.needs)} are there, {witness.committed} were committed")
    return found


def sweep(benches: list[Bench], cases: Callable[[], Case | None], report: Callable[[Verdict, float], None]) -> None:
    """Run cases on several threads until there are none."""

    def work(bench: Bench) -> None:
        while (case := cases()) is not None:
            begin_s = time.monotonic()
            verdict = run_case(bench, case)
            report(verdict, time.monotonic() - begin_s)

    threads = [threading.Thread(target=work, args=(bench,), daemon=True) for bench in benches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
