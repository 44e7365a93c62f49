"""Run many seeds: ``python -m tests.simulation --seeds 20000 --first 0 --jobs 2``."""

from __future__ import annotations

import argparse
import sys
from multiprocessing import Pool

from tests.simulation.node import Node, SimulationError, run
from tests.simulation.options import Options


def _one(seed: int) -> tuple[int, str | None]:
    try:
        run(seed)
    except SimulationError as error:
        return seed, str(error)
    return seed, None


def main() -> int:
    """Run the seeds asked for; print each failure, and end with how many there were."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--show", type=int, default=3, help="how many failures to print in full")
    parser.add_argument("--trace", action="store_true", help="print the whole trace of the first seed")
    options = parser.parse_args()
    if options.trace:
        return _trace(options.first)
    failures = 0
    with Pool(options.jobs) as pool:
        for seed, problem in pool.imap_unordered(_one, range(options.first, options.first + options.seeds), 32):
            if problem is not None:
                failures += 1
                print(problem if failures <= options.show else f"seed {seed}: {problem.splitlines()[0]}", flush=True)
    print(f"{options.seeds} seeds from {options.first}: {failures} failures")
    return 1 if failures else 0


def _trace(seed: int) -> int:
    node = Node(seed, Options.draw(seed))
    print(node.options)
    node.trace = type(node.trace)(maxlen=None)
    try:
        node.run()
    except Exception as problem:
        print("\n".join(node.lines()))
        print(f"{type(problem).__name__}: {problem}")
        raise
    print("\n".join(node.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
