"""`ckptctl stop`: stop a running job at its next boundary, with a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from ckptd.cli.common import LONG_CALL_DEADLINE_S, ask_owner, known_job
from ckptd.protocol.messages import Control


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "stop",
        help="stop a running job at its next boundary, with a checkpoint",
        description="Capture at the next boundary, have the ranks leave there, and bring the checkpoint to every store "
        "of the job. What has not come there when the grace is over is said, and uploaded by the next start. The "
        "same command as before goes on from there. To stop later: ckptctl halt.",
    )
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("--grace", metavar="TIME", help='how long it may take, like "90s" (default: the job\'s, 60s)')
    parser.add_argument("--no-checkpoint", action="store_true", help="end the ranks now, without a last capture")
    parser.add_argument("--no-wait", action="store_true", help="don't wait until it is done")
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Stop a running job at its next boundary, with a checkpoint."""
    wishes: dict[str, Any] = {"no_checkpoint": True} if options.no_checkpoint else {}
    if options.grace is not None:
        wishes["grace"] = options.grace
    message = Control(options.job, "stop", not options.no_wait, options=wishes)
    result = ask_owner(options.job, message, LONG_CALL_DEADLINE_S)
    last = known_job(options.job).status["last_committed"]
    newest = (
        "" if last is None or options.no_wait else f"; its newest checkpoint is step {last['step']} on {last['tier']}"
    )
    print(f"job {options.job}: {result['outcome']}{newest}")
    return 0
