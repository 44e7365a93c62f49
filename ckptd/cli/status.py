"""`ckptctl status`: what jobs are doing now, or did last."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckptd.cli.common import COMES_BACK, GOES_ON, TERMINAL, ask, known_job, open_journal, when
from ckptd.cli.halt import describe
from ckptd.cli.incident_text import shorten
from ckptd.cli.render import aligned, columns, show_json, show_table
from ckptd.errors import AgentError, NotFoundError
from ckptd.journal import JobEntry
from ckptd.protocol.messages import Status
from ckptd.units import show_duration

_STARTED = 19
"""The place of a process's start time in /proc/PID/stat, counted from behind its name."""
_WIDTH = 110
_LONGEST = 500
_NOT_READY = "not ready"
"""The kind of warning that a job has while its node is not fit for a start."""


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser("status", help="what jobs are doing, or did last")
    parser.add_argument("job", nargs="?", metavar="JOB", help="one job; all of them without it")
    parser.add_argument(
        "--json",
        action="store_true",
        help="{job, state, generation, step, ranks: [{rank, pid, state, step, section}], last_committed: {step, tier}, "
        "restarts, error, hang: {limit_s, rule, since_step_s}, warnings: [{kind, rank, summary, since_s}], "
        "halt: {after_step, at, at_next_checkpoint, left_s, margin_s, stopping, grace_left_s}, "
        "numbers: {policy, metric, bad: {rank, step, kind}, healthy, suspect, skipped, afresh}, "
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
            incidents = open_journal().read_incidents(options.job)
            wait_s = entry.config.get("check_wait_s")
            lines = _tell(
                status, incidents, comes_back=entry.life.comes_back, width=columns(_WIDTH), check_wait_s=wait_s
            )
            print("\n".join(lines))
            titles = "RANK> PID> STATE STEP>"
            ranks = [(rank["rank"], _dash(rank["pid"]), _doing(rank), _dash(rank["step"])) for rank in status["ranks"]]
            show_table(titles, ranks, "no rank")
        return 0
    statuses = [current(entry) for entry in open_journal().read_jobs()]
    if options.json:
        show_json(statuses)
        return 0
    rows = [(item["job"], item["state"], *_began(item), _committed(item), item["restarts"]) for item in statuses]
    titles = "JOB STATE GENERATION> STEP> COMMITTED> RESTARTS>"
    show_table(titles, rows, "no job has run here yet")
    return 0


def current(entry: JobEntry) -> dict[str, Any]:
    """Return a job's live state, or its last one when its agent is gone; ranks may live on without it."""
    if entry.status["state"] not in TERMINAL:
        try:
            (status,) = ask(entry.agent_socket, Status(entry.job))["jobs"]
            return dict(status)
        except (AgentError, NotFoundError):
            began = entry.life.ranks_started
            ranks = [
                {**rank, "state": "alive" if _lives(rank["pid"], began.get(str(rank["rank"]))) else "gone"}
                for rank in entry.status["ranks"]
            ]
            return {**entry.status, "state": "interrupted", "ranks": ranks}
    return entry.status


def _lives(pid: int | None, began: int | None) -> bool:
    """Tell whether the process that had this number, and began then, still runs."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return False
    return words[0] not in ("Z", "X") and int(words[_STARTED]) == began


def _tell(
    status: dict[str, Any],
    incidents: Sequence[dict[str, Any]],
    *,
    comes_back: bool,
    width: int = _WIDTH,
    check_wait_s: float | None = None,
) -> list[str]:
    """Return what is said of a job before the table of its ranks."""
    state, over = status["state"], status["state"] in TERMINAL
    restarts = f"{status['restarts']} restart{'' if status['restarts'] == 1 else 's'} in this run"
    generation, step = _began(status)
    fields = [
        ("job", status["job"]),
        ("state", state),
        ("generation", f"{'none yet' if generation == '-' else generation} ({restarts})"),
        ("step", step),
        ("last step", _last_step(status)),
        ("committed", _committed(status)),
        ("stopped" if over else "stops", _stops(status)),
        ("scrub", _scrub(status["scrub"])),
    ]
    if over:
        fields = [(name, value) for name, value in fields if value != "-"]
    if incidents:
        last = incidents[-1]
        said = f"`ckptctl incidents {status['job']} {last['number']}`, {when(last['failed_at'])}: "
        fields.append(("incident", said + shorten(last["cause"], max(20, width - 12 - len(said)))))
    lines = aligned(fields)
    if status.get("error"):
        why, _, hint = shorten(status["error"], _LONGEST).partition(" (hint: ")
        lines += ["", *textwrap.wrap(f"It has failed: {why}", width)]
        lines += textwrap.wrap(f"  hint: {hint.removesuffix(')')}", width, subsequent_indent="  ") if hint else []
    if comes_back and over:
        lines += ["", COMES_BACK.capitalize()]
    elif state == "interrupted":
        lines += ["", *textwrap.wrap(_interrupted(status, comes_back=comes_back), width)]
    present = () if state == "interrupted" else status.get("warnings", ())
    warned = [f"Warning for {show_duration(item['since_s'])}: {_warned(item, check_wait_s)}" for item in present]
    warnings = [line for text in warned for line in textwrap.wrap(text, width)]
    return [*lines, *([""] if warnings else []), *warnings, ""]


def _began(status: dict[str, Any]) -> tuple[object, object]:
    """Return generation and step, dashes where this run has none yet."""
    return (status["generation"], status["step"]) if status["generation"] else ("-", "-")


def _interrupted(status: dict[str, Any], *, comes_back: bool) -> str:
    """Say what becomes of a job whose agent is gone."""
    if any(rank["state"] == "alive" for rank in status["ranks"]):
        then = "its ranks go on without it, and wait for the next one: systemctl start ckptd"
    elif comes_back:
        then = COMES_BACK
    else:
        then = GOES_ON
    return f"Its agent is gone; {then}"


def _warned(warning: dict[str, Any], check_wait_s: float | None) -> str:
    kind, summary = warning["kind"], warning["summary"]
    text = summary if kind in summary else f"{kind}: {summary}"
    waits = kind == _NOT_READY and check_wait_s is not None
    return f"{text}; after {check_wait_s:g} s of this the job is given up (check_wait)" if waits else text


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
    if halt is None or status["state"] == "interrupted":
        return "-"
    return (halt["stopping"] if status["state"] in TERMINAL else describe(halt)) or "-"


def _doing(rank: dict[str, Any]) -> str:
    section = None if rank["state"] == "gone" else rank.get("section")
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
    copies = "copy" if scrub["checked"] == 1 else "copies"
    return f"{scrub['checked']} {copies} read{mended}, damaged now: {damaged}; the last at {when(scrub['last_at'])}"


def _dash(value: object) -> object:
    return "-" if value is None else value
