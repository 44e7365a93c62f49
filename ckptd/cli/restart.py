"""`ckptctl restart`: restart a whole running job from its newest snapshot, or from an older checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from ckptd.cli.common import ask_owner, whole_number
from ckptd.protocol.messages import Control


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "restart",
        help="restart a whole running job",
        description="Restart a whole running job from its newest snapshot, or from an older checkpoint: what is newer "
        "than that is left behind for good. A job that waits to be restarted is restarted at once. Ranks that another "
        "launcher has started are killed, at which it starts new ones.",
    )
    parser.add_argument("job", metavar="JOB")
    parser.add_argument(
        "--from", dest="step", metavar="STEP", help="begin with the newest checkpoint at STEP or before it"
    )
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Restart a whole running job."""
    step = whole_number(options.step, "step", f"`ckptctl ls {options.job}` lists them")
    result = ask_owner(options.job, Control(options.job, "restart", step=step))
    begins = "from its newest snapshot" if step is None else f"from step {result['step']}"
    print(f"job {options.job}: restarting {begins}; `ckptctl incidents {options.job}` tells how it went")
    return 0
