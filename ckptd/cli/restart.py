"""`ckptctl restart`: restart a whole running job from its newest snapshot."""

from __future__ import annotations

import argparse
from typing import Any

from ckptd.cli.common import ask_owner
from ckptd.protocol.messages import Control


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser("restart", help="restart a whole running job from its newest snapshot")
    parser.add_argument("job", metavar="JOB")
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Restart a whole running job from its newest snapshot."""
    ask_owner(options.job, Control(options.job, "restart"))
    print(f"job {options.job}: restarting; `ckptctl incidents {options.job}` tells how it went")
    return 0
