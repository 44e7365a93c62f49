"""Further comparisons, each with one question: odd tensors, a busy disk, frozen weights, replicas, an idle agent."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tests.bench import catalogue, machine, world
from tests.bench.bars import Bar
from tests.bench.measure import Spread, ratio, show, slower, spread, table
from tests.bench.plan import Plan, Shape

MIB = 2**20
HUGE_MIB = 4096


def _mode(args: argparse.Namespace) -> str:
    """Return ckptd's default way of capture here, unless --only names another."""
    wanted = [name for name in catalogue.pick(args.only) if catalogue.is_ckptd(name)]
    default = catalogue.CKPTD + "auto"
    return default if default in wanted or not wanted else wanted[0]


def _run(args: argparse.Namespace, name: str, phases: tuple[str, ...], shape: Shape, ranks: int = 2) -> dict[str, Any]:
    print(f"... {name}: {shape.tensors} tensors, {shape.size_mib:g} MiB", file=sys.stderr, flush=True)
    with world.place(args.dir) as folder:
        return world.run(Plan(name, str(folder), phases, args.repeat, ranks, shape, args.quiet_s))


def _figure(found: dict[str, Any], phase: str, key: str) -> Spread | None:
    return spread(slower([rank[phase] for rank in found["ranks"]], key))


def _report(rows: Sequence[dict[str, str]], bars: Sequence[Bar]) -> None:
    print(f"\n{machine.line()}\n")
    print(table(rows))
    if bars:
        print()
        print(table([bar.row() for bar in bars]))


def tensors(args: argparse.Namespace) -> dict[str, Any]:
    """10,000 tensors of 4 KiB, and one of 4 GiB, each beside the same bytes in 150 tensors."""
    small_mib = 10_000 * 4096 / MIB
    shapes = {
        "10,000 x 4 KiB": (2, Shape(small_mib, 10_000, "fp32", moments=False)),
        "the same in 150": (2, Shape(small_mib, 150, "fp32", moments=False)),
        "1 x 4 GiB": (1, Shape(HUGE_MIB, 1, "fp32", moments=False)),
        "the same in 150 ": (1, Shape(HUGE_MIB, 150, "fp32", moments=False)),
    }
    name, rows, found = _mode(args), [], {}
    for what, (ranks, shape) in shapes.items():
        idle = _run(args, name, ("idle",), shape, ranks)
        with world.place(args.dir) as folder:
            plan = Plan(name, str(folder), (), min(3, args.repeat), ranks, shape)
            restores = spread(slower(world.restores(plan, "disk", prepared=True), "restore_s"))
        stall, durable = _figure(idle, "idle", "stall_s"), _figure(idle, "idle", "durable_s")
        found[what] = {"stall_s": stall, "durable_s": durable, "restore_s": restores}
        rows.append({
            "state of a rank": what, "ranks": str(ranks), "stall ms": show(stall, 1e3, 1), "durable s": show(durable),
            "restore from disk s": show(restores, 1, 3),
        })  # fmt: skip
    bars = [
        Bar(f"{key[:-2]}: {odd} / {even}", ratio(found[odd][key], found[even][key]), 2)
        for odd, even in (("10,000 x 4 KiB", "the same in 150"), ("1 x 4 GiB", "the same in 150 "))
        for key in ("stall_s", "durable_s", "restore_s")
    ]
    _report(rows, bars)
    return found


def writer(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds until durable beside a second program that writes buffered files, and in quiet, in turn."""
    own = _mode(args)
    names = [own, *(name for name in catalogue.pick(args.only) if name.startswith("dcp.async") or name == "dcp.save")]
    rows, found, bars = [], {}, []
    for name in names:
        result = _run(args, name, ("writer",), Shape(args.size, args.tensors, args.dtype[0]), args.ranks)
        quiet, beside = _figure(result, "writer", "quiet_s"), _figure(result, "writer", "beside_s")
        found[name] = {"quiet_s": quiet, "beside_s": beside}
        kept = ratio(quiet, beside)
        rows.append({"contender": name, "durable in quiet s": show(quiet), "beside a writer s": show(beside),
                     "rate kept": "-" if kept is None else f"{kept:.2f}"})  # fmt: skip
        if name == own:
            bars = [Bar("rate kept beside a writer", kept, 0.8, at_most=False)]
    _report(rows, bars)
    return found


def _written(
    args: argparse.Namespace, shape: Shape, names: Sequence[str]
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    rows, found = [], {}
    for name in names:
        result = _run(args, name, ("memory", "idle"), shape, args.ranks)
        written = _figure(result, "idle", "written_bytes")
        state = result["ranks"][0]["state_bytes"]
        peaks = [rank["memory"] for rank in result["ranks"]]
        found[name] = {"written_bytes": written, "state_bytes": state, "memory": peaks}
        rows.append({
            "contender": name, "state of a rank MiB": f"{state / MIB:.0f}", "written MiB": show(written, 1 / MIB, 0),
            "durable s": show(_figure(result, "idle", "durable_s")),
            "ranks' shared MiB": f"{sum(peak['shared_bytes'] for peak in peaks) / MIB:.0f}",
            "ranks' private MiB": f"{sum(peak['private_bytes'] for peak in peaks) / MIB:.0f}",
        })  # fmt: skip
    return rows, found


def lora(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes written per checkpoint after the first, of a state of which 95 % never change."""
    own = _mode(args)
    shape = Shape(args.size, args.tensors, args.dtype[0], frozen=0.95)
    rows, found = _written(args, shape, [own, "dcp.save"])
    part = found[own]["written_bytes"]["median"] / (found[own]["state_bytes"] * args.ranks)
    _report(rows, [Bar("written per checkpoint / full state", part, 0.10)])
    return found


def replicated(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes written and memory for state that all ranks hold alike, as under DistributedDataParallel."""
    own = _mode(args)
    rows, found = _written(args, Shape(args.size, args.tensors, args.dtype[0], replicated=True), [own, "dcp.save"])
    copies = found[own]["written_bytes"]["median"] / found[own]["state_bytes"]
    _report(rows, [Bar("copies of replicated state that are written", copies, 1.02)])
    return found


def idle(args: argparse.Namespace) -> dict[str, Any]:
    """The agent's CPU and memory over 20 s of training in which nothing is due."""
    result = _run(args, _mode(args), ("watch",), Shape(args.size, args.tensors, args.dtype[0]), args.ranks)
    found: dict[str, float] = result["ranks"][0]["watch"][0]
    percent, agent_mib = found["agent_cpu_cores"] * 100, found["agent_bytes"] / MIB
    _report(
        [{"agent's CPU, % of a core": f"{percent:.2f}", "memory besides slots, MiB": f"{agent_mib:.0f}"}],
        [Bar("idle CPU, % of a core", percent, 1), Bar("memory besides slots, MiB", agent_mib, 100)],
    )
    return found


CASES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "tensors": tensors,
    "writer": writer,
    "lora": lora,
    "idle": idle,
    "replicated": replicated,
}
