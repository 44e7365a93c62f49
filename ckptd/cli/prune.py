"""`ckptctl prune`: remove checkpoints that retention lets go, and what nobody needs; or bring one back."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ckptd.cli.common import JobPlace, checkpoints, find_job, step_number, when
from ckptd.cli.health import health_of
from ckptd.cli.render import show_json, show_table
from ckptd.core import lineage
from ckptd.core.policy import retention
from ckptd.core.policy.garbage import LEAST_GRACE_S
from ckptd.errors import CkptdError, ConfigError, FencedError, NotFoundError, RefusedError
from ckptd.pruning.needs import Needs
from ckptd.pruning.prune import Plan, Pruning, Removed, Task
from ckptd.storage import catalog, removing
from ckptd.store_config import StoreConfig, read_stores
from ckptd.tiers import retention_of
from ckptd.types import CheckpointId, Held
from ckptd.units import parse_duration, show_size

_RULES = ("keep_last", "keep_every", "keep_best")
_ALL = 2**62
_DESCRIPTION = """\
Remove what retention does not keep on each tier of a job, and what nobody needs: files that were never committed,
temporary files, open multipart uploads, generation records. The plan is printed first; --dry-run ends there.

Without --keep-... the rules of the job's own stores count; with any, only those that are given. The newest checkpoint
that a restart can begin with stays whatever they say, and so does what has a name (ckptctl tag).

Where an agent can keep others out (a folder), it prunes by itself, and this verb is refused while it runs the job.
Elsewhere (a bucket) nothing younger than --garbage-after is taken for garbage, and a removal can be undone for an hour
at least, unless --grace says otherwise.
"""


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "prune",
        help="remove checkpoints that no rule keeps, and garbage",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", metavar="JOB", help="its name, or where it is: s3://bucket/runs/gpt, ./runs/gpt")
    parser.add_argument("--store", metavar="PLACE", help="look here instead of where the job ran")
    parser.add_argument("--tier", metavar="NAME", help="prune this tier only")
    parser.add_argument("--keep-last", type=int, metavar="N", help="keep so many of the newest")
    parser.add_argument("--keep-every", metavar="STRETCH", help='keep the first of each "6h" or "5000 steps"')
    parser.add_argument("--keep-best", metavar="METRIC", help='keep the best by a metric, like "loss:min:3"')
    parser.add_argument("--max", metavar="SIZE", help="a bound beside the rules, like 20TB; the oldest go first")
    parser.add_argument("--grace", metavar="TIME", help="for how long it can be undone; 0: not at all")
    parser.add_argument("--garbage-after", metavar="TIME", help="how old garbage must be where others may write")
    parser.add_argument("--undo", metavar="STEP", help="bring a checkpoint back that was removed")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and change nothing")
    parser.add_argument("--json", action="store_true", help="a list, one item a tier: see ckptd/cli/README.md")
    parser.set_defaults(verb=run)


@dataclass(frozen=True, slots=True)
class _Planned:
    """What is about to be done on one tier."""

    place: JobPlace
    alone: bool
    """Whether nobody else can be writing there."""
    verdicts: Sequence[retention.Verdict]
    held: Sequence[Held]
    plan: Plan
    pruning: Pruning


def run(options: argparse.Namespace) -> int:
    """Plan, print, then act; or undo."""
    places = find_job(options.job, options.store, options.tier)
    if options.undo is not None:
        return _undo(places, step_number(options.undo), dry_run=options.dry_run, json=options.json)
    configs = [_settings(place, options) for place in places]
    alone = [_hold(place, dry_run=options.dry_run) for place in places]
    whole = options.tier is None and options.store is None and "/" not in options.job
    planned = _plan(places, configs, alone, options, whole=whole)
    if not options.json:
        for item in planned:
            _show(item)
    done = [None if options.dry_run else item.pruning.carry_out(item.plan) for item in planned]
    if options.json:
        show_json([_to_json(item, removed) for item, removed in zip(planned, done, strict=True)])
    errors = [error for removed in done if removed is not None for error in removed.errors]
    for item, removed in zip(planned, done, strict=True):
        if removed is not None and not options.json:
            print(f"{item.place.name}: {show_size(removed.freed_bytes)} in {removed.files} files are free now")
    for error in errors:
        print(f"ckptctl: error: {error}", file=sys.stderr)
    return errors[0].exit_code if errors else 0


# --- what is asked for --------------------------------------------------------------------------------------------


def _settings(place: JobPlace, options: argparse.Namespace) -> StoreConfig:
    """Return the rules of a tier: what was said, else the job's own. A bound alone takes no rule away."""
    rules = {name: getattr(options, name) for name in _RULES if getattr(options, name) is not None}
    bound = {} if options.max is None else {"max": options.max}
    own = place.config
    if own is None and not rules and not bound:
        raise ConfigError(
            f"nothing says what to keep in {place.tier.url}", hint="say it, like --keep-last 3; or name a job that ran"
        )
    settings = {"url": place.tier.url} if own is None else own.to_json()
    if rules:
        settings |= {"keep_last": 1, "keep_every_s": 0.0, "keep_every_steps": 0, "keep_best": "", "max_bytes": 0}
    elif own is None:
        settings |= {"keep_last": _ALL}
    (config,) = read_stores([{**settings, **rules, **bound}], 1)
    if options.garbage_after is not None:
        seconds = parse_duration(options.garbage_after, "--garbage-after")
        config = dataclasses.replace(config, garbage_after_s=seconds)
    return config


def _grace_s(config: StoreConfig, said: str | None, *, alone: bool) -> float:
    if said is not None:
        return 0.0 if said.strip() == "0" else parse_duration(said, "--grace")
    return config.grace_s if alone else max(config.grace_s, LEAST_GRACE_S)


def _hold(place: JobPlace, *, dry_run: bool) -> bool:
    """Keep agents out while we act; return whether nobody else can be writing."""
    if not place.tier.capabilities.exclusive_hold:
        return False
    try:
        place.tier.hold(place.job, 0.0)
    except RefusedError:
        return False
    except FencedError as error:
        if dry_run:
            return False
        hint = "the agent that runs the job prunes it; stop the job to do it by hand"
        raise FencedError(error.message, hint=hint) from error
    return True


# --- the plan -----------------------------------------------------------------------------------------------------


def _plan(
    places: Sequence[JobPlace],
    configs: Sequence[StoreConfig],
    alone: Sequence[bool],
    options: argparse.Namespace,
    *,
    whole: bool,
) -> list[_Planned]:
    holdings = [catalog.holdings(place.tier, place.job) for place in places]
    parents = {number: parent for item in holdings for number, parent in item.parents.items()}
    everywhere = sorted({checkpoint for item in holdings for checkpoint in item.committed})
    if not parents and not everywhere:
        checkpoints(places)  # says so, and which jobs there are
    line = lineage.candidates(parents, everywhere)
    needed_from = min((item.generation for item in everywhere), default=None) if whole else None
    held_by = {checkpoint: place for place, item in zip(places, holdings, strict=True) for checkpoint in item.committed}
    health = health_of(places, {checkpoint: held_by[checkpoint] for checkpoint in line})
    planned: list[_Planned] = []
    for place, config, is_alone, here in zip(places, configs, alone, holdings, strict=True):
        with_values = bool(config.keep_best or config.keep_every_s)
        held = catalog.held(place.tier, place.job, with_values=with_values)
        restorable = next((item for item in line if item in here.committed), None)
        in_use = {} if restorable is None else {restorable: "the newest that a restart can begin with"}
        in_use |= health.needed(here.committed)
        verdicts = retention.judge(held, retention_of(config), in_use)
        needs = Needs(place.tier, place.job)
        needs.own(max(parents, default=0))
        grace_s = _grace_s(config, options.grace, alone=is_alone)
        after_s = config.garbage_after_s
        pruning = Pruning(place.tier, place.job, needs, exclusive=is_alone, grace_s=grace_s, garbage_after_s=after_s)
        task = Task(
            at_once=grace_s == 0 and options.grace is not None, garbage=True, sweep=True, needed_from=needed_from
        )
        plan = pruning.plan([item.id for item in verdicts if not item.keep], [], task)
        planned.append(_Planned(place, is_alone, verdicts, held, plan, pruning))
    return planned


# --- what people and programs see ---------------------------------------------------------------------------------


def _checkpoints(item: _Planned) -> list[dict[str, Any]]:
    sizes = {held.id: held.size_bytes for held in item.held}
    going = "undoable" if item.plan.undoable else "remove"
    rows = [
        _row(verdict.id, sizes[verdict.id], "keep" if verdict.keep else going, verdict.reasons)
        for verdict in item.verdicts
    ]
    for found in item.plan.markers:
        if found.final or not found.ends:
            files = [
                file.file.size_bytes for file in item.plan.files if file.file.checkpoint == found.marker.checkpoint
            ]
            verdict = "final" if found.final else "waits"
            rows.append(_row(found.marker.checkpoint, sum(files), verdict, (found.reason,)))
    return rows


def _row(checkpoint: CheckpointId, size_bytes: int, verdict: str, reasons: Sequence[str]) -> dict[str, Any]:
    return {**checkpoint._asdict(), "size_bytes": size_bytes, "verdict": verdict, "reasons": list(reasons)}


def _garbage(item: _Planned) -> list[dict[str, Any]]:
    gone = item.plan.going | {found.marker.checkpoint for found in item.plan.markers if found.final}
    return [
        {"file": found.file.name, "size_bytes": found.file.size_bytes, "reason": found.reason}
        for found in item.plan.files
        if found.remove and found.file.checkpoint not in gone
    ]


def _planned_bytes(item: _Planned) -> int:
    return sum(found.file.size_bytes for found in item.plan.files if found.remove)


def _to_json(item: _Planned, removed: Removed | None) -> dict[str, Any]:
    return {
        "tier": item.place.name,
        "alone": item.alone,
        "checkpoints": _checkpoints(item),
        "garbage": _garbage(item),
        "records": list(item.plan.records),
        "planned_bytes": _planned_bytes(item),
        "freed_bytes": None if removed is None else removed.freed_bytes,
        "swept": [] if removed is None else list(removed.swept),
        "errors": [] if removed is None else [error.to_json() for error in removed.errors],
    }


def _show(item: _Planned) -> None:
    where = f"{item.place.name} ({item.place.tier.url})"
    print(f"{where}: job {item.place.job}{'' if item.alone else ', which others may be writing'}")
    rows = [
        (row["step"], row["generation"], show_size(row["size_bytes"]), row["verdict"], "; ".join(row["reasons"]))
        for row in _checkpoints(item)
    ]
    show_table("STEP> GENERATION> SIZE> VERDICT REASONS", rows, "no checkpoints")
    for found in _garbage(item):
        print(f"garbage: {found['file']}, {show_size(found['size_bytes'])}: {found['reason']}")
    if item.plan.records:
        print(f"generation records that nothing needs: {', '.join(map(str, item.plan.records))}")
    print(f"{item.place.name}: {show_size(_planned_bytes(item))} to be freed")


def _undo(places: Sequence[JobPlace], step: int | None, *, dry_run: bool, json: bool) -> int:
    """Bring a checkpoint back on every tier where that can be done."""
    undone: list[dict[str, Any]] = []
    problem: CkptdError | None = None
    for place in places:
        found = [item for item in catalog.listing(place.tier, place.job).markers if item.checkpoint.step == step]
        if not found:
            continue
        newest = max(found, key=lambda item: (item.checkpoint, item.deleted_at))
        act = removing.find_removed if dry_run else removing.undo
        try:
            _hold(place, dry_run=dry_run)
            act(place.tier, place.job, newest.checkpoint)
        except CkptdError as error:
            problem = error
            continue
        undone.append({**newest.checkpoint._asdict(), "tier": place.name, "deleted_at": newest.deleted_at})
    if json and undone:
        show_json(undone)
    elif undone:
        done = "can be committed again" if dry_run else "committed again"
        for item in undone:
            print(f"step {step} of generation {item['generation']} on {item['tier']}: {done},", end=" ")
            print(f"removed {when(item['deleted_at'])}")
    if problem is not None:
        raise problem
    if not undone:
        checkpoints(places)  # or there is no such job
        raise NotFoundError(
            f"no removal of step {step} of job {places[0].job} can be undone",
            hint=f"`ckptctl ls {places[0].job} --deleted` lists those that can",
        )
    return 0
