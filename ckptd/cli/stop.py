"""`ckptctl stop`: stop a running job at its next boundary, with a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from ckptd.cli.common import LONG_CALL_DEADLINE_S, ask_owner
from ckptd.protocol.messages import Control


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser("stop", help="stop a running job at its next boundary, with a checkpoint")
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("--no-wait", action="store_true", help="don't wait until it is done")
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Stop a running job at its next boundary, with a checkpoint."""
    result = ask_owner(options.job, Control(options.job, "stop", not options.no_wait), LONG_CALL_DEADLINE_S)
    print(f"job {options.job}: {result['outcome']}")
    return 0
