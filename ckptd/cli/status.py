"""`ckptctl status`: what jobs are doing now, or did last."""

from __future__ import annotations

import argparse
from typing import Any

from ckptd.cli.common import ask, known_job, open_journal, when
from ckptd.cli.render import show_fields, show_json, show_table
from ckptd.errors import AgentError, NotFoundError
from ckptd.journal import JobEntry
from ckptd.protocol.messages import Status

_TERMINAL = ("finished", "failed", "stopped")


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser("status", help="what jobs are doing, or did last")
    parser.add_argument("job", nargs="?", metavar="JOB", help="one job; all of them without it")
    parser.add_argument(
        "--json",
        action="store_true",
        help="{job, state, generation, step, ranks: [{rank, pid, state, step}], last_committed: {step, tier}, "
        "restarts, scrub: {last_at, checked, mended, damaged: [{generation, step, tier}]}}; a list of them without JOB",
    )
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Show one job or all."""
    if options.job is not None:
        status = current(known_job(options.job))
        if options.json:
            show_json(status)
        else:
            _show_one(status)
        return 0
    statuses = [current(entry) for entry in open_journal().read_jobs()]
    if options.json:
        show_json(statuses)
        return 0
    rows = [
        (item["job"], item["state"], item["generation"], item["step"], _committed(item), item["restarts"])
        for item in statuses
    ]
    columns = "JOB STATE GENERATION> STEP> COMMITTED> RESTARTS>"
    show_table(columns, rows, "no job has run here yet")
    return 0


def current(entry: JobEntry) -> dict[str, Any]:
    """Return a job's live state, or its last one when its agent is gone."""
    if entry.status["state"] not in _TERMINAL:
        try:
            (status,) = ask(entry.agent_socket, Status(entry.job))["jobs"]
            return dict(status)
        except (AgentError, NotFoundError):
            ranks = [{**rank, "state": "gone"} for rank in entry.status["ranks"]]
            return {**entry.status, "state": "interrupted", "ranks": ranks}
    return entry.status


def _show_one(status: dict[str, Any]) -> None:
    show_fields(
        [
            ("job", status["job"]),
            ("state", status["state"]),
            ("generation", f"{status['generation']} ({status['restarts']} restarts in this run)"),
            ("step", status["step"]),
            ("committed", _committed(status)),
            ("scrub", _scrub(status["scrub"])),
        ]
    )
    if status["state"] == "interrupted":
        print("\nIts agent is gone. Run the same command again: it goes on from the newest checkpoint.")
    print()
    columns = "RANK> PID> STATE STEP>"
    rows = [(rank["rank"], _dash(rank["pid"]), rank["state"], _dash(rank["step"])) for rank in status["ranks"]]
    show_table(columns, rows, "no rank")


def _committed(status: dict[str, Any]) -> str:
    last = status["last_committed"]
    return "-" if last is None else f"step {last['step']} on {last['tier']}"


def _scrub(scrub: dict[str, Any]) -> str:
    """Say what reading stored copies again has found in this run."""
    if scrub["last_at"] is None:
        return "no copy has been read again yet"
    damaged = ", ".join(f"step {item['step']} on {item['tier']}" for item in scrub["damaged"]) or "none"
    mended = f", {scrub['mended']} mended" if scrub["mended"] else ""
    return f"{scrub['checked']} copies read{mended}, damaged now: {damaged}; the last at {when(scrub['last_at'])}"


def _dash(value: object) -> object:
    return "-" if value is None else value
