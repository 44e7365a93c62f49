"""`ckptctl incidents`: what went wrong, what was done about it and what it cost."""

from __future__ import annotations

import argparse
from typing import Any

from ckptd.cli.common import known_job, open_journal, when, whole_number
from ckptd.cli.render import show_fields, show_json, show_table
from ckptd.errors import NotFoundError
from ckptd.units import show_duration


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser("incidents", help="what went wrong, and what it cost")
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("number", nargs="?", metavar="N", help="one incident, whole")
    parser.add_argument(
        "--json",
        action="store_true",
        help="a list of {number, generation, cause, rank, signal, returncode, failed_at, failed_step, lost_steps, "
        "restored: {step, tier, generation}, seconds: {detect, kill, decide, start, restore, first_step, total}, "
        "decision, reasons, consequences, exception, last_lines, kind, evidence_path, closed}",
    )
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Show a job's incidents."""
    known_job(options.job)
    incidents = open_journal().read_incidents(options.job)
    listed = f"`ckptctl incidents {options.job}` lists them by number"
    number = whole_number(options.number, "incident", listed)
    if number is not None:
        incidents = [item for item in incidents if item["number"] == number]
        if not incidents:
            raise NotFoundError(f"job {options.job} has no incident {number}", hint=listed)
    if options.json:
        show_json(incidents)
    elif number is not None:
        _show_one(incidents[0])
    else:
        columns = "N> WHEN CAUSE STEP> LOST> RESTORED TOOK>"
        show_table(columns, [_row(item) for item in incidents], f"job {options.job} has had no incident")
    return 0


def _row(item: dict[str, Any]) -> tuple[object, ...]:
    total = item["seconds"].get("total")
    return (
        item["number"],
        when(item["failed_at"]),
        item["cause"][:60],
        item["failed_step"],
        "-" if item["lost_steps"] is None else item["lost_steps"],
        _restored(item),
        "-" if total is None else show_duration(total),
    )


def _restored(item: dict[str, Any]) -> str:
    restored = item["restored"]
    if restored is not None:
        return f"step {restored['step']} from {restored['tier']}"
    return "-" if item["lost_steps"] is None else "fresh start"


def _show_one(item: dict[str, Any]) -> None:
    lost = "nothing restarted" if item["lost_steps"] is None else f"{item['lost_steps']} steps"
    fields: list[tuple[str, object]] = [
        ("incident", f"{item['number']} of job {item['job']}, {'closed' if item['closed'] else 'open'}"),
        ("when", f"{when(item['failed_at'])}, at step {item['failed_step']} of generation {item['generation']}"),
        ("cause", item["cause"]),
        ("decision", item["decision"] or "not yet"),
        ("because", "; ".join(item["reasons"]) or "-"),
        ("restored", _restored(item)),
        ("lost", lost),
        ("took", ", ".join(f"{name} {show_duration(part)}" for name, part in item["seconds"].items()) or "-"),
    ]
    if item["consequences"]:
        fields.append(("then", "; ".join(item["consequences"])))
    show_fields(fields)
    if item["exception"] is not None:
        print(f"\n{item['exception']['traceback'].rstrip()}")
    elif item["last_lines"]:
        print("\nThe last lines that the rank wrote to stderr:")
        for line in item["last_lines"][-8:]:
            print(f"  {line}")
