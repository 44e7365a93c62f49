"""`ckptctl halt`: when a running job is to stop by itself."""

from __future__ import annotations

import argparse
import time
from typing import Any

from ckptd.cli.common import ask_owner, when
from ckptd.cli.render import show_json
from ckptd.errors import ConfigError
from ckptd.halt_config import read_halt
from ckptd.protocol.messages import Control
from ckptd.units import show_duration


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "halt",
        help="set, show or clear when a running job stops by itself",
        description="The job stops as with ckptctl stop, upon the first condition that is met: with a checkpoint, and "
        "resumable. Without a flag the conditions are shown. They are gone with this run of the job; those of every "
        "run are flags of ckptctl run, and the table [halt] of a job file.",
    )
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("--after-step", type=int, metavar="N", help="after step N, which is captured")
    parser.add_argument("--at", metavar="MOMENT", help='at a moment, like "2026-12-01T06:00" (local time)')
    parser.add_argument("--at-next-checkpoint", action="store_true", help="with the next checkpoint")
    parser.add_argument("--clear", action="store_true", help="forget the conditions set before")
    parser.add_argument(
        "--json",
        action="store_true",
        help="{job, after_step, at, at_next_checkpoint, left_s, margin_s, stopping, grace_left_s}",
    )
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Set what is named, and show what holds then."""
    flags = {
        "after_step": options.after_step,
        "at": options.at,
        "at_next_checkpoint": options.at_next_checkpoint or None,
        "clear": options.clear or None,
    }
    at = None if options.at is None else read_halt({"at": options.at}).at
    if at is not None and at <= time.time():
        raise ConfigError(f"--at is {when(at)}, which is over", hint=f"to stop now: ckptctl stop {options.job}")
    wishes = {key: value for key, value in flags.items() if value is not None}
    result = ask_owner(options.job, Control(options.job, "halt", options=wishes))
    if options.json:
        show_json(result)
    else:
        print(f"job {options.job} stops {describe(result) or 'only when somebody asks for it'}")
    return 0


def describe(halt: dict[str, Any]) -> str:
    """Say upon what a job stops, or that it does; nothing when it just goes on."""
    if halt["stopping"] is not None:
        left_s = halt["grace_left_s"]
        return f"now: {halt['stopping']}" + ("" if left_s is None else f"; within {show_duration(left_s)}")
    said: list[str] = []
    if halt["after_step"] is not None:
        said.append(f"after step {halt['after_step']}")
    if halt["at"] is not None:
        said.append(f"at {when(halt['at'])}")
    if halt["at_next_checkpoint"]:
        said.append("with the next checkpoint")
    if halt["left_s"] is not None:
        begins_s = max(0.0, halt["left_s"] - halt["margin_s"])
        said.append(f"in {show_duration(begins_s)}, {show_duration(halt['margin_s'])} before its time is over")
    return ", or ".join(said)
