"""Cut the power of a guest that commits checkpoints, again and again: ``make powercut ARGS="--kills 50 --seed 7"``."""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.powercut.campaign import Campaign, ViolationError
from tests.powercut.guest import SABOTAGE
from tests.powercut.machine import StartError
from tests.powercut.root import MissingError


def main() -> int:
    """Run a campaign; return 0 when every promise was kept, or when sabotage was noticed."""
    parser = argparse.ArgumentParser(prog="python -m tests.powercut", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="how often the power goes (default: 50)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="what all choices are drawn from")
    parser.add_argument("--sabotage", choices=SABOTAGE, help="break the guest's fsync; that must be noticed")
    parser.add_argument("--keep", action="store_true", help="leave the disk's image and the guest's console")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = Path(tempfile.mkdtemp(prefix="powercut-"))
    try:
        return _run(options, folder)
    except (MissingError, StartError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if options.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder)


def _run(options: argparse.Namespace, folder: Path) -> int:
    begin_s = time.monotonic()
    print(f"seed {options.seed}", flush=True)
    campaign = Campaign(folder, options.seed, options.sabotage)
    violation = None
    try:
        for line in campaign.run(options.kills):
            print(line, flush=True)
    except ViolationError as error:
        violation = error
        print(f"VIOLATION {error}", flush=True)
    cuts = ", ".join(f"{phase} {count}" for phase, count in sorted(campaign.cuts.items()))
    writes = ", ".join(f"{count} {what}" for what, count in campaign.cut_writes.items())
    print(
        f"{campaign.cuts.total()} power cuts in {time.monotonic() - begin_s:.0f} s, at {cuts or 'nothing'}; "
        f"writes in the cache: {writes or 'none'}; {campaign.commits} commits acknowledged, "
        f"{campaign.looks} checkpoints verified after boots"
    )
    if options.sabotage:
        print(f"{options.sabotage} was {'noticed' if violation else 'NOT noticed'}")
        return 0 if violation else 1
    return 1 if violation else 0


if __name__ == "__main__":
    sys.exit(main())
