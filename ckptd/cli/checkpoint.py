"""`ckptctl checkpoint`: ask a running job for a checkpoint now."""

from __future__ import annotations

import argparse
from typing import Any

from ckptd.cli.common import LONG_CALL_DEADLINE_S, ask_owner
from ckptd.protocol.messages import Control


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser("checkpoint", help="ask a running job for a checkpoint now")
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("--no-wait", action="store_true", help="don't wait until it is done")
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Ask a running job for a checkpoint now."""
    result = ask_owner(options.job, Control(options.job, "checkpoint", not options.no_wait), LONG_CALL_DEADLINE_S)
    step = result.get("step")
    print(f"job {options.job}: " + ("asked" if step is None else f"step {step} is committed"))
    return 0
