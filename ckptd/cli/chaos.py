"""`ckptctl chaos`: do harm to a job on purpose, to see that it survives."""

from __future__ import annotations

import argparse
import math
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ckptd.cli.common import ask_owner, known_job, open_journal, when, whole_number
from ckptd.cli.incident_text import shorten
from ckptd.cli.render import show_table
from ckptd.cli.status import current
from ckptd.core.policy.chaos import KINDS, OF_RANKS, Campaign, Fault, Planned, plan
from ckptd.errors import AgentError, CkptdError, ConfigError
from ckptd.protocol import messages as m
from ckptd.units import parse_duration, show_duration

_CALL_DEADLINE_S = 150.0
"""A fault waits for its ranks to be there."""
_COMEBACK_S = 60.0
"""How long a killed agent has to come back, and a job to train again after the last fault."""
_POLL_S = 0.2
_BEFORE_S = 0.5
"""An incident may have begun so long before the agent's answer that the fault was done."""
_MAKE_INCIDENTS = ("kill", "stop", "exception", "launcher")
_GOING_ON = ("pending", "preparing", "starting", "running", "fenced", "backoff")
_DESCRIPTION = """\
Do harm to a job on purpose. It works only for jobs that allow it: `ckptctl run --allow-chaos`, or chaos = true in the
job file. Without --at and --mtbf: one fault, at once.

Faults (--fault, several times: any of them is drawn)
  kill       a signal to a rank (--signal KILL, SEGV, ABRT, TERM, ...)
  stop       SIGSTOP to a rank: it hangs
  exception  run.step() raises ChaosError in a rank
  nan        the first tensor of a rank's state becomes NaN
  slow       a rank takes longer for each step (--pause), for a while (--for)
  full-disk  the first store refuses what is put there, for a while (--for); no disk is really filled
  launcher   SIGKILL to the job's launcher
  agent      SIGKILL to the agent; whoever started it has to start it again, as systemd does
"""
_EPILOG = """\
Why exponential times: failures have no memory, the next one is always as likely as ever. Faults at a fixed period would
keep time with the captures and hit the same moment of each interval again and again; a job could pass that dies of all
the others. So there is no option for a period. --seed repeats a campaign: the same faults after the same times.
"""


@dataclass(frozen=True, slots=True)
class _Done:
    """A fault that was done, and when, on the wall clock."""

    at: float
    kind: str
    before: frozenset[int]
    """The incidents that there were already."""


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "chaos",
        help="do harm to a job that allows it, to see that it survives",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("--fault", action="append", choices=KINDS, help="what to do (default kill)")
    parser.add_argument("--signal", action="append", metavar="NAME", help="of a kill (default KILL); several times")
    parser.add_argument("--rank", type=int, metavar="R", help="hit this rank only (default: any)")
    parser.add_argument(
        "--at", action="append", metavar="RANK:STEP", help="hit that rank after that step, in this order; several times"
    )
    parser.add_argument("--mtbf", metavar="TIME", help='mean time between random faults, like "30s"')
    parser.add_argument(
        "--correlated",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of faults that are not alone: several ranks at once, or a second one within the restart "
        "(default 0)",
    )
    parser.add_argument("--count", metavar="N", help="end after so many faults")
    parser.add_argument("--duration", metavar="TIME", help="end after so long (default: at Ctrl-C)")
    parser.add_argument("--seed", metavar="N", help="what is drawn depends on this alone (default: another each time)")
    parser.add_argument("--for", dest="for_", default="10s", metavar="TIME", help="of slow, full-disk (default 10s)")
    parser.add_argument("--pause", default="200ms", metavar="TIME", help="what slow adds to a step (default 200ms)")
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Do what is wanted, say each fault, and sum up what became of the job."""
    world_size = int(known_job(options.job).config.get("nproc", 1))
    before = _numbers(options.job)
    planned = _explicit(options) if options.at else _random(options, world_size)
    done: list[_Done] = []
    code = 0
    began_s = time.monotonic()
    try:
        for item in planned:
            time.sleep(max(0.0, began_s + item.at_s - time.monotonic()))
            done.append(_inflict(options.job, item))
        _until_trains(options.job, done[-1] if done else None)
    except KeyboardInterrupt:
        print(file=sys.stderr)
    except CkptdError as error:
        if not done:
            raise
        print(f"ckptctl: error: {error}", file=sys.stderr)
        code = error.exit_code
    _sum_up(options.job, before, done)
    return code


# --- what is wanted -------------------------------------------------------------------------------------------


def _explicit(options: argparse.Namespace) -> Iterator[Planned]:
    """Return the faults of `--at`: of each kind one there, in the order of the command line."""
    kinds = options.fault or ["kill"]
    if options.mtbf or options.count or options.duration or options.rank is not None:
        raise ConfigError("--at says where and when already", hint="leave out --mtbf, --count, --duration and --rank")
    whole = [kind for kind in kinds if kind not in OF_RANKS]
    if whole:
        raise ConfigError(f"--at names a rank, and {whole[0]} hits the whole job", hint="leave out --at")
    hint = "write it like 1:300, a rank and a step"
    for place in options.at:
        rank, _, step = place.partition(":")
        ranks = (whole_number(rank, "rank", hint) or 0,)
        at_step = whole_number(step, "step", hint)
        for kind in kinds:
            yield Planned(0.0, Fault(kind, ranks, at_step, _signals(options)[0], *_spans(options)))


def _random(options: argparse.Namespace, world_size: int) -> Iterator[Planned]:
    one = options.mtbf is None
    if one and (options.count or options.duration or options.correlated):
        raise ConfigError("--count, --duration and --correlated are of random faults", hint='add --mtbf, like "30s"')
    seed = whole_number(options.seed, "seed", "a seed is a whole number")
    seed = time.time_ns() % 10**9 if seed is None else seed
    for_s, pause_s = _spans(options)
    wanted = whole_number(options.count, "count", "it says how many faults there are")
    campaign = Campaign(
        world_size=world_size,
        seed=seed,
        mtbf_s=1.0 if one else parse_duration(options.mtbf, "--mtbf"),
        kinds=tuple(options.fault or ["kill"]),
        signals=_signals(options),
        rank=options.rank,
        correlated=options.correlated,
        count=1 if one else wanted,
        duration_s=math.inf if options.duration is None else parse_duration(options.duration, "--duration"),
        for_s=for_s,
        pause_s=pause_s,
    )
    print(f"seed {seed}: --seed {seed} repeats this", flush=True)
    return plan(campaign) if not one else (Planned(0.0, item.fault) for item in plan(campaign))


def _signals(options: argparse.Namespace) -> tuple[int, ...]:
    numbers = []
    for name in options.signal or ["KILL"]:
        try:
            numbers.append(signal.Signals["SIG" + name.upper().removeprefix("SIG")])
        except KeyError:
            raise ConfigError(f"there is no signal {name!r}", hint="write it like KILL or SIGSEGV") from None
    return tuple(numbers)


def _spans(options: argparse.Namespace) -> tuple[float, float]:
    return parse_duration(options.for_, "--for"), parse_duration(options.pause, "--pause")


# --- what is done ---------------------------------------------------------------------------------------------


def _inflict(job: str, planned: Planned) -> _Done:
    """Have the agent do a fault, and say it."""
    fault = planned.fault
    pid, before = known_job(job).agent_pid, _numbers(job)
    if fault.step is not None:
        print(f"waiting for rank {fault.ranks[0]} to finish step {fault.step}", file=sys.stderr)
    result = ask_owner(job, m.Fault(job, fault.to_json()), _CALL_DEADLINE_S)
    at = time.time()
    what = result["what"] + (", within the restart" if planned.follows else "")
    print(f"{when(at)}  {what}, at step {result['step']} of generation {result['generation']}", flush=True)
    if fault.kind == "agent":
        _until_agent_is_back(job, pid)
    return _Done(at, fault.kind, before)


def _numbers(job: str) -> frozenset[int]:
    return frozenset(item["number"] for item in open_journal().read_incidents(job))


def _until_agent_is_back(job: str, pid: int) -> None:
    end_s = time.monotonic() + _COMEBACK_S
    while known_job(job).agent_pid == pid:
        if time.monotonic() > end_s:
            raise AgentError(
                f"no other agent has taken over job {job} within {_COMEBACK_S:g} s",
                hint="whoever started ckptd has to start it again, as systemd does",
            )
        time.sleep(_POLL_S)


def _until_trains(job: str, last: _Done | None) -> None:
    """Wait until the job is over the last fault: an incident later than that, and every rank training; or its end."""
    end_s = time.monotonic() + _COMEBACK_S
    while last is not None and time.monotonic() < end_s:
        status = current(known_job(job))
        seen = last.kind not in _MAKE_INCIDENTS or any(
            item["failed_at"] > last.at - _BEFORE_S and "total" in item["seconds"]
            for item in open_journal().read_incidents(job)
            if item["number"] not in last.before
        )
        if status["state"] not in _GOING_ON or (seen and status["state"] == "running"):
            return
        time.sleep(_POLL_S)


def _sum_up(job: str, before: frozenset[int], done: list[_Done]) -> None:
    """Show the incidents since, and what they cost together."""
    incidents = [item for item in open_journal().read_incidents(job) if item["number"] not in before]
    print()
    show_table("N> CAUSE FOUND> LOST> TOOK>", [_row(item) for item in incidents], "there was no incident")
    back = [item["seconds"]["total"] for item in incidents if "total" in item["seconds"]]
    lost = sum(item["lost_steps"] or 0 for item in incidents)
    line = f"\nfaults: {len(done)}, incidents: {len(incidents)}, steps done again: {lost}, recoveries: {len(back)}"
    if back:
        line += f", in {show_duration(statistics.median(back))} at the median and {show_duration(max(back))} at most"
    print(line)
    print(f"job {job} is {current(known_job(job))['state']}; `ckptctl verify {job} --all` reads what it has committed")


def _row(item: dict[str, Any]) -> tuple[object, ...]:
    seconds = item["seconds"]
    spans = [show_duration(seconds[name]) if name in seconds else "-" for name in ("detect", "total")]
    lost = "-" if item["lost_steps"] is None else item["lost_steps"]
    return item["number"], shorten(item["cause"], 60), spans[0], lost, spans[1]
