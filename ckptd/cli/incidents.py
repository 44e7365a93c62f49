"""`ckptctl incidents`: what went wrong, what was done about it and what it cost."""

from __future__ import annotations

import argparse
from typing import Any

from ckptd.cli.common import known_job, open_journal, when, whole_number
from ckptd.cli.incident_text import WIDTH, restored, shorten, tell
from ckptd.cli.render import columns, show_json, show_table
from ckptd.errors import NotFoundError
from ckptd.units import show_duration

_CAUSE_WIDTH = 60


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "incidents",
        help="what went wrong, and what it cost",
        description="List what has gone wrong with a job, or tell one incident whole: which failure was the cause, why "
        "ckptd decided as it did, which steps and seconds it cost and where the evidence lies, in less than 20 lines. "
        "Of an exception the user's innermost frames are shown; the whole traceback is with the evidence.",
    )
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("number", nargs="?", metavar="N", help="one incident, whole")
    parser.add_argument(
        "--json",
        action="store_true",
        help="a list of {number, job, generation, cause, rank, signal, returncode, failed_at, failed_step, lost_steps, "
        "restored: {step, tier, generation}, seconds: {detect, kill, decide, start, restore, first_step, total}, "
        "decision, reasons, consequences, exception, last_lines, kind, evidence_path, closed}",
    )
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Show a job's incidents."""
    entry = known_job(options.job)
    incidents = known = open_journal().read_incidents(options.job)
    listed = f"`ckptctl incidents {options.job}` lists them by number"
    number = whole_number(options.number, "incident", listed)
    if number is not None:
        incidents = [item for item in incidents if item["number"] == number]
        if not incidents:
            raise NotFoundError(
                f"job {options.job} has no incident {number}", hint=listed if known else "it has had none"
            )
    if options.json:
        show_json(incidents)
    elif number is not None:
        ended = entry.status["state"] == "failed" and number == known[-1]["number"]
        print("\n".join(tell(incidents[0], columns(WIDTH), left=_left(entry.status) if ended else "")))
    else:
        titles = "N> WHEN CAUSE STEP> LOST> RESTORED TOOK>"
        show_table(titles, [_row(item) for item in incidents], f"job {options.job} has had no incident")
    return 0


def _left(status: dict[str, Any]) -> str:
    """Say what a job that was given up can go on with."""
    last = status["last_committed"]
    return (
        "no checkpoint was made" if last is None else f"the newest checkpoint is step {last['step']} on {last['tier']}"
    )


def _row(item: dict[str, Any]) -> tuple[object, ...]:
    total = item["seconds"].get("total")
    return (
        item["number"],
        when(item["failed_at"]),
        shorten(item["cause"], _CAUSE_WIDTH),
        item["failed_step"],
        "-" if item["lost_steps"] is None else item["lost_steps"],
        restored(item),
        "-" if total is None else show_duration(total),
    )
