"""`ckptctl status`: what jobs are doing now, or did last."""

from __future__ import annotations

import argparse
from typing import Any

from ckptd.cli.common import ask, known_job, open_journal, when
from ckptd.cli.halt import describe
from ckptd.cli.render import show_fields, show_json, show_table
from ckptd.errors import AgentError, NotFoundError
from ckptd.journal import JobEntry
from ckptd.protocol.messages import Status
from ckptd.units import show_duration

_TERMINAL = ("finished", "failed", "stopped")


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser("status", help="what jobs are doing, or did last")
    parser.add_argument("job", nargs="?", metavar="JOB", help="one job; all of them without it")
    parser.add_argument(
        "--json",
        action="store_true",
        help="{job, state, generation, step, ranks: [{rank, pid, state, step, section}], last_committed: {step, tier}, "
        "restarts, hang: {limit_s, rule, since_step_s}, warnings: [{kind, rank, summary, since_s}], "
        "halt: {after_step, at, at_next_checkpoint, left_s, margin_s, stopping, grace_left_s}, "
        "scrub: {last_at, checked, mended, damaged: [{generation, step, tier}]}}; a list of them without JOB",
    )
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Show one job or all."""
    if options.job is not None:
        entry = known_job(options.job)
        status = current(entry)
        if options.json:
            show_json(status)
        else:
            _show_one(status, comes_back=entry.life.comes_back)
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


def _show_one(status: dict[str, Any], *, comes_back: bool) -> None:
    show_fields(
        [
            ("job", status["job"]),
            ("state", status["state"]),
            ("generation", f"{status['generation']} ({status['restarts']} restarts in this run)"),
            ("step", status["step"]),
            ("last step", _last_step(status)),
            ("committed", _committed(status)),
            ("stops", _stops(status)),
            ("scrub", _scrub(status["scrub"])),
        ]
    )
    if comes_back and status["state"] in (*_TERMINAL, "interrupted"):
        print("\nIt comes back by itself when the service starts: systemctl start ckptd")
    elif status["state"] == "interrupted":
        print("\nIts agent is gone. Run the same command again: it goes on from the newest checkpoint.")
    print()
    for warning in status.get("warnings", ()):
        print(f"Warning for {show_duration(warning['since_s'])}: {warning['kind']}: {warning['summary']}")
    columns = "RANK> PID> STATE STEP>"
    rows = [(rank["rank"], _dash(rank["pid"]), _doing(rank), _dash(rank["step"])) for rank in status["ranks"]]
    show_table(columns, rows, "no rank")


def _last_step(status: dict[str, Any]) -> str:
    """Say how long ago a rank finished a step, and from when on the job counts as hung."""
    hang = status.get("hang")
    if hang is None or status["state"] not in ("starting", "running"):
        return "-"
    since = "none yet" if hang["since_step_s"] is None else f"{show_duration(hang['since_step_s'])} ago"
    return f"{since}; hung after {show_duration(hang['limit_s'])} without one ({hang['rule']})"


def _stops(status: dict[str, Any]) -> str:
    """Say upon what the job stops by itself, or why it is stopped."""
    halt = status.get("halt")
    if halt is None:
        return "-"
    return (halt["stopping"] if status["state"] in _TERMINAL else describe(halt)) or "-"


def _doing(rank: dict[str, Any]) -> str:
    section = rank.get("section")
    return rank["state"] if section is None else f"{rank['state']}, in section {section!r}"


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
