"""`make bench`: what a checkpoint costs, ckptd beside what a user would pick instead, on the same state in one run.

Contenders take turns, round by round. Prints tables of figures, of the machine's limits and of what ckptd promises.
`--case` runs one of the further comparisons.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench import bars, cases, catalogue, damage, machine, world
from tests.bench.limits import Limits
from tests.bench.measure import Spread, best, ratio, show, slower, spread, table, times
from tests.bench.plan import Plan, Shape

BLOCKING = ("torch.save + fsync", "dcp.save")
PEAK = ("private_bytes", "shared_bytes", "beside_private_bytes", "agent_bytes")
Round = dict[str, Any]


def worlds(name: str, *, first: bool) -> list[tuple[str, ...]]:
    """Return the phases of a contender's worlds in one round; memory and loads are measured in the first only.

    Where ckptd chooses by what a capture costs in the job, each kind of loop is a job of its own.
    """
    head = ("memory",) if first else ()
    if name in BLOCKING:  # training stands still: nothing runs beside them
        own: list[tuple[str, ...]] = [(*head, "idle")]
    elif name.endswith("=auto"):
        own = [("full",), ("waiting", *head, "idle")]
    else:
        own = [(*head, "idle", "full", "waiting")]
    if first and not catalogue.is_ckptd(name) and name != catalogue.NOTHING:
        own[-1] = (*own[-1], "load cold", "load warm")
    return own


def share(repeats: int, rounds: int, number: int) -> int:
    """Return how many of all repetitions fall into a round."""
    return repeats // rounds + (1 if number < repeats % rounds else 0)


def measure_all(names: Sequence[str], args: argparse.Namespace, shape: Shape) -> tuple[dict[str, list[Round]], Any]:
    """Let every contender and the machine's limits take their turns."""
    found: dict[str, list[Round]] = {name: [] for name in names}
    limits: dict[str, list[float]] = {}
    with world.place(args.dir) as folder:
        beds = Limits(folder, int(shape.size_mib * 2**20), args.ranks)
        beds.tune()
        print(f"... fastest ways: write {beds.write_way}, read {beds.read_way}", file=sys.stderr, flush=True)
        beds.measure()
        for number in range(args.rounds):
            count = share(args.repeat, args.rounds, number)
            for name in names:
                print(f"... round {number + 1}, {shape.dtype}: {name}", file=sys.stderr, flush=True)
                for phases in worlds(name, first=not number):
                    with world.place(args.dir) as own:
                        plan = Plan(name, str(own), phases, count, args.ranks, shape, args.quiet_s)
                        found[name].append(world.run(plan))
            for _ in range(count):
                for what, seconds in beds.measure().items():
                    limits.setdefault(what, []).append(seconds)
        ways = {"write": str(beds.write_way), "read": str(beds.read_way)}
        beds.close()
    return found, {"seconds": limits, "ways": ways}


def figures(rounds: Sequence[Round], phase: str, key: str) -> list[float]:
    """Return a figure of every repetition in every round: that of the slower rank."""
    return [value for each in rounds for value in slower([rank.get(phase, []) for rank in each["ranks"]], key)]


def summarise(name: str, rounds: Sequence[Round]) -> dict[str, Any]:
    """Return all figures of a contender as spreads."""
    item: dict[str, Any] = {
        "name": name,
        "stall_s": spread(figures(rounds, "idle", "stall_s")),
        "durable_s": spread(figures(rounds, "idle", "durable_s")),
        "load_cold_s": spread(figures(rounds, "load cold", "load_s")),
        "load_warm_s": spread(figures(rounds, "load warm", "load_s")),
        "other_cores": spread(each["other_cores"] for each in rounds),
    }
    for kind in ("full", "waiting"):
        base = figures(rounds, kind, "base_step_s")
        item[f"lost_{kind}_s"] = spread(figures(rounds, kind, "lost_s")) or item["stall_s"]
        item[f"wait_{kind}_s"] = spread(figures(rounds, kind, "wait_s"))
        item[f"stall_{kind}_s"] = spread(figures(rounds, kind, "stall_s"))
        item[f"base_{kind}_s"] = spread(base)
        for column, key in (("longest", "longest_flush_s"), ("longest_all", "longest_step_s")):
            longest = figures(rounds, kind, key)
            item[f"{column}_{kind}"] = spread(one / other for one, other in zip(longest, base, strict=True))
    ranks = [rank for each in rounds for rank in each["ranks"]]
    state_bytes = sum(rank["state_bytes"] for rank in rounds[0]["ranks"])
    item["state_bytes"] = state_bytes
    item["written"] = max(figures(rounds, "idle", "written_bytes")) / state_bytes
    for key in ("rank_cpu_s", "beside_cpu_s"):
        sums = [sum(each[key] for each in both) for turn in rounds for both in zip(*_phase(turn, "idle"), strict=True)]
        item[key] = spread(sums)
    peaks = [rank["memory"] for rank in ranks if "memory" in rank]
    for key in PEAK:
        item[key.replace("_bytes", "_mib")] = max((peak[key] for peak in peaks), default=0) / 2**20
    return item


def _phase(turn: Round, name: str) -> list[list[dict[str, float]]]:
    return [rank.get(name, []) for rank in turn["ranks"]]


def cost_row(item: dict[str, Any], own: dict[str, Any], limits: dict[str, Spread | None]) -> dict[str, str]:
    """Return a printed row of what a checkpoint costs; `x` is the ratio to ckptd, `limit` to the machine's."""
    return {
        "contender": item["name"],
        "stall ms": show(item["stall_s"], 1e3, 1),
        "x": times(ratio(item["stall_s"], own["stall_s"])),
        "/memcpy": times(ratio(item["stall_s"], limits["memcpy"])),
        "durable s": show(item["durable_s"]),
        "x ": times(ratio(item["durable_s"], own["durable_s"])),
        "/O_DIRECT": times(ratio(item["durable_s"], limits["O_DIRECT write"])),
        "lost full ms": show(item["lost_full_s"], 1e3, 0),
        "lost waiting ms": show(item["lost_waiting_s"], 1e3, 0),
        "hook wait full, waiting ms": f"{show(item['wait_full_s'], 1e3, 0)}, {show(item['wait_waiting_s'], 1e3, 0)}",
        "longest step full": show(item["longest_full"]),
        "longest step waiting": show(item["longest_waiting"]),
        "with hook wait": f"{show(item['longest_all_full'])}, {show(item['longest_all_waiting'])}",
        "noise cores": show(item["other_cores"]),
    }


def use_row(item: dict[str, Any]) -> dict[str, str]:
    """Return a printed row of what a checkpoint uses."""
    return {
        "contender": item["name"],
        "written / state": f"{item['written']:.2f}",
        "rank private MiB": f"{item['private_mib']:.0f}",
        "rank shared MiB": f"{item['shared_mib']:.0f}",
        "beside private MiB": f"{item['beside_private_mib']:.0f}",
        "ranks' CPU s": show(item["rank_cpu_s"]),
        "CPU s beside": show(item["beside_cpu_s"]),
        "load cold s": show(item["load_cold_s"]),
        "load warm s": show(item["load_warm_s"]),
    }


def limit_row(name: str, size: int, seconds: Spread | None) -> dict[str, str]:
    """Return a printed row of what the machine allows."""
    rate = size / seconds["median"] / 1e9 if seconds else 0.0
    return {"limit, all ranks at once": name, "s": show(seconds, 1, 3), "GB/s": f"{rate:.2f}"}


def measure_restores(args: argparse.Namespace, shape: Shape) -> dict[str, dict[str, Spread | None]]:
    """Return ckptd's restores: from memory and disk into prepared objects, from memory into fresh ones."""
    found = {}
    for name, what, prepared in (
        ("memory", "memory", True),
        ("memory, fresh", "memory", False),
        ("disk", "disk", True),
    ):
        print(f"... restores, {shape.dtype}: {name}", file=sys.stderr, flush=True)
        with world.place(args.dir) as folder:
            plan = Plan(catalogue.CKPTD + "off", str(folder), (), args.repeat, args.ranks, shape)
            ranks = world.restores(plan, what, prepared=prepared)
            found[name] = {key: spread(slower(ranks, key)) for key in ("restore_s", "attach_s")}
    return found


def restore_row(name: str, found: dict[str, Spread | None], limits: dict[str, Spread | None]) -> dict[str, str]:
    """Return a printed row of restores; the whole of `attach` has slots to reserve as well."""
    limit = "O_DIRECT read" if name == "disk" else "memcpy"
    return {
        "ckptd restores from": name,
        "restore s": show(found["restore_s"], 1, 3),
        "/limit": times(ratio(found["restore_s"], limits[limit])),
        "attach s": show(found["attach_s"], 1, 3),
    }


def run(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Measure and print everything for one kind of state."""
    shape = Shape(args.size, args.tensors, dtype, device=args.device)
    wanted = catalogue.pick(args.only)
    absent = {name: reason for name in wanted if (reason := catalogue.why_not(name, args.device))}
    names = [name for name in wanted if name not in absent]
    rounds, limits = measure_all(names, args, shape)
    items = {name: summarise(name, rounds[name]) for name in names}
    bounds = {name: spread(seconds) for name, seconds in limits["seconds"].items()}
    own = items.get(catalogue.CKPTD + bars.chosen(items)) or next(iter(items.values()))
    print(f"\n{machine.line()}\n{args.ranks} ranks of {args.size:g} MiB in {args.tensors} tensors, {dtype}", end=", ")
    print(f"on {args.device}\n")
    print(table([cost_row(item, own, bounds) for item in items.values()] + [_absent(*pair) for pair in absent.items()]))
    print()
    print(table([use_row(item) for item in items.values()]))
    print()
    size = int(args.size * 2**20) * args.ranks
    copies = [rank["copy_out_s"] for turns in rounds.values() for turn in turns for rank in turn["ranks"]
              if "copy_out_s" in rank]  # fmt: skip
    bounds |= {"device to page-locked memory": spread(copies)} if copies else {}
    print(table([limit_row(name, size, seconds) for name, seconds in bounds.items()]))
    kept = bars.checkpoint_bars(items, bounds)
    restores: dict[str, dict[str, Spread | None]] = {}
    if any(map(catalogue.is_ckptd, names)):
        restores = measure_restores(args, shape)
        peer = best(items, catalogue.TORCH, "load_cold_s")
        print()
        print(table([restore_row(name, each, bounds) for name, each in restores.items()]))
        print(f"the fastest other cold load: {peer[0]}, {show(peer[1], 1, 3)} s" if peer else "no other was loaded")
        kept += bars.restore_bars({name: each["restore_s"] for name, each in restores.items()}, bounds)
    print()
    print(table([bar.row() for bar in kept]))
    return {"contenders": items, "absent": absent, "limits": limits, "restores": restores, "rounds": rounds,
            "bars": [bar.row() for bar in kept]}  # fmt: skip


def _absent(name: str, reason: str) -> dict[str, str]:
    return {"contender": name, "stall ms": reason}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--case", choices=[*cases.CASES, "damage"], help="one further comparison instead")
    parser.add_argument("--size", type=float, default=512, metavar="MIB", help="state per rank (default 512)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks (default 2)")
    parser.add_argument("--tensors", type=int, default=150, help="tensors per rank (default 150)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the state lies")
    types = "of weights and moments; may be repeated; mixed (default): half of them fp32, half bf16"
    parser.add_argument("--dtype", action="append", choices=("mixed", "fp32", "bf16"), help=types)
    parser.add_argument("--repeat", type=int, help="repetitions of each figure after a warm-up (default 5)")
    parser.add_argument("--rounds", type=int, help="turns among which they are divided (default 2)")
    parser.add_argument("--quick", action="store_true", help="few repetitions of the main contenders: 2 minutes")
    parser.add_argument("--only", action="append", help="contenders whose name contains this; may be repeated")
    parser.add_argument("--dir", default=None, help="the disk to write to (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args(given)
    args.quiet_s = 0.6 if args.quick else 0.9
    args.dtype = args.dtype or ["mixed"]
    args.repeat = args.repeat or (2 if args.quick else 5)
    args.rounds = min(args.repeat, args.rounds or (1 if args.quick else 2))
    if args.quick and not args.only:
        args.only = ["dcp.async thread, kept", "ckptd"]
    return args


def main() -> None:
    """Measure, print, and write what was measured."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that what was started is ended
    world.prepare(args.ranks)
    begin_s = time.monotonic()
    try:
        if args.case == "damage":
            found: dict[str, Any] = {"damage": damage.run(args)}
        elif args.case:
            found = {args.case: cases.CASES[args.case](args)}
        else:
            found = {dtype: run(args, dtype) for dtype in args.dtype}
    except world.WorldError as error:
        raise SystemExit(str(error)) from error
    print(f"\ntook {time.monotonic() - begin_s:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine.line(), **found}, indent=1))


if __name__ == "__main__":
    main()
