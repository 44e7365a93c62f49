"""`ckptctl verify`: read checkpoints completely and compare every digest; mend what is damaged where somebody asks."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ckptd.cli.common import Copy, JobPlace, checkpoints, find_job, pick, step_number
from ckptd.cli.render import show_json
from ckptd.errors import CkptdError, ConfigError, DamagedError, FencedError, NotFoundError, RefusedError
from ckptd.storage import fetching
from ckptd.storage.catalog import verify
from ckptd.types import CheckpointId
from ckptd.units import show_size

_SHOW_EVERY_S = 0.1


@dataclass(slots=True)
class _Result:
    """What is known of one copy at the end."""

    tier: str
    id: CheckpointId
    problems: list[str]
    """What is damaged now."""
    mended: list[fetching.Repair] = field(default_factory=list)


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser("verify", help="check that checkpoints are intact, to the last bit, and mend them")
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("step", nargs="?", metavar="STEP", help="the newest one without it")
    parser.add_argument("--all", action="store_true", help="check every checkpoint of the job")
    parser.add_argument(
        "--store", metavar="PLACE", action="append", help="look here instead of where the job ran; may be repeated"
    )
    parser.add_argument("--tier", metavar="NAME", help="verify on this tier only")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="replace what is damaged by what the other tiers, or the other --store, have of it; the job must not run",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="a list of {generation, step, tier, intact, problems, mended: [{file, problems, tier}]}; "
        "intact and problems tell how it is now",
    )
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Verify; exit code 5 when anything is damaged and was not mended."""
    if options.all and options.step is not None:
        raise ConfigError("STEP and --all exclude each other")
    everywhere = _places(options.job, options.store)
    try:
        results = _verify(everywhere, options)
    finally:
        for place in everywhere:
            place.tier.close()
    if options.json:
        show_json([_to_json(result) for result in results])
    else:
        for result in results:
            _show(result)
    return DamagedError.exit_code if any(result.problems for result in results) else 0


def _verify(everywhere: Sequence[JobPlace], options: argparse.Namespace) -> list[_Result]:
    places = [place for place in everywhere if options.tier in (None, place.name)]
    if not places:
        known = ", ".join(place.name for place in everywhere)
        raise NotFoundError(f"job {options.job} has no tier {options.tier}", hint=f"its tiers: {known}")
    chosen = checkpoints(places) if options.all else pick(places, step_number(options.step))
    results: list[_Result] = []
    for number, copy in enumerate(chosen, 1):
        progress = _Progress(f"verifying {number} of {len(chosen)}: step {copy[1].step} on {copy[0].name}")
        problems = verify(copy[0].tier, copy[0].job, copy[1], progress=progress.read)
        result = _Result(copy[0].name, copy[1], problems)
        if problems and options.repair:
            _mend(copy, [place for place in everywhere if place is not copy[0]], result, progress)
        progress.clear()
        results.append(result)
    return results


def _places(job: str, stores: Sequence[str] | None) -> list[JobPlace]:
    """Return every place of a job, each under a name of its own."""
    if not stores:
        return find_job(job, None)
    places: list[JobPlace] = []
    for store in stores:
        (place,) = find_job(job, store)
        alike = sum(other.tier.name == place.tier.name for other in places)
        places.append(replace(place, name=f"{place.name}-{alike + 1}") if alike else place)
    return places


def _mend(copy: Copy, others: Sequence[JobPlace], result: _Result, progress: _Progress) -> None:
    """Replace what is damaged of a copy, then look again: what it says is what is there now."""
    place, checkpoint = copy
    _keep_agents_out(place)
    tiers = [other.tier for other in others]
    names = {other.tier.name: other.name for other in others}
    why: list[str] = []
    try:
        repairs = fetching.repair(place.tier, tiers, place.job, checkpoint, progress=progress.read)
    except CkptdError as error:
        why.append(error.message)
        repairs = []
    result.mended = [replace(item, source=names[item.source]) for item in repairs if item.source is not None]
    why += [item.error for item in repairs if item.error is not None]
    result.problems = verify(place.tier, place.job, checkpoint, progress=progress.read)
    if result.problems:
        result.problems += dict.fromkeys(why)


def _keep_agents_out(place: JobPlace) -> None:
    """Hold the job where that can be done, so that no prune removes what is being mended."""
    if not place.tier.capabilities.exclusive_hold:
        return
    try:
        place.tier.hold(place.job, 0.0)
    except RefusedError:
        return  # there are no locks there
    except FencedError as error:
        raise FencedError(
            f"{error.message}: nothing is mended on {place.name}",
            hint="an agent mends what its scrub finds (`scrub` of a store says how often); or stop the job first",
        ) from error


def _to_json(result: _Result) -> dict[str, Any]:
    return {
        **result.id._asdict(),
        "tier": result.tier,
        "intact": not result.problems,
        "problems": result.problems,
        "mended": [{"file": item.file, "problems": list(item.problems), "tier": item.source} for item in result.mended],
    }


def _show(result: _Result) -> None:
    state = "DAMAGED" if result.problems else "mended" if result.mended else "intact"
    print(f"step {result.id.step} of generation {result.id.generation} on {result.tier}: {state}")
    for item in result.mended:
        print(f"  {item.file}: {item.problems[0]}; mended from {item.source}")
    for problem in result.problems:
        print(f"  {problem}")


class _Progress:
    """One line on a terminal that says how much has been read."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._bytes = 0
        self._shown_at_s = 0.0
        self._seen = sys.stderr.isatty()
        self.read(0)

    def read(self, size_bytes: int) -> None:
        """Count bytes that were read; from any thread."""
        with self._lock:
            self._bytes += size_bytes
            now_s = time.monotonic()
            if not self._seen or now_s - self._shown_at_s < _SHOW_EVERY_S:
                return
            self._shown_at_s = now_s
            print(f"\r{self._what}, {show_size(self._bytes)} \x1b[K", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line away."""
        if self._seen:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
