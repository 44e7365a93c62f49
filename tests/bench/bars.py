"""What ckptd promises about its speed, held against what was measured: pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.bench.catalogue import CKPTD, PEERS, TORCH
from tests.bench.measure import Spread, best, ratio, times

Items = Mapping[str, Mapping[str, Any]]
ASYNC = tuple(name for name in TORCH if "async" in name)
DCP = tuple(name for name in TORCH if name.startswith("dcp"))
OTHERS = (*TORCH, *PEERS)


@dataclass(frozen=True)
class Bar:
    """One promise: a figure and the bound it has to keep."""

    what: str
    figure: float | None
    bound: float
    at_most: bool = True

    @property
    def holds(self) -> bool | None:
        """Whether the figure keeps the bound; None when it was not measured."""
        if self.figure is None:
            return None
        return self.figure <= self.bound if self.at_most else self.figure >= self.bound

    def row(self) -> dict[str, str]:
        """Return a printed row."""
        verdict = {True: "yes", False: "NO", None: "not measured"}[self.holds]
        sign = "<=" if self.at_most else ">="
        return {"bar": self.what, "figure": times(self.figure), "bound": f"{sign} {self.bound:g}", "holds": verdict}


def _figure(items: Items, mode: str, key: str) -> Spread | None:
    found: Spread | None = items.get(CKPTD + mode, {}).get(key)
    return found


def _beside(items: Items, mode: str, key: str, names: Iterable[str]) -> float | None:
    """Return ckptd's median over that of the best of others."""
    found = best(items, names, key)
    return ratio(_figure(items, mode, key), found[1]) if found else None


def _inverse(number: float | None) -> float | None:
    return 1 / number if number else None


def chosen(items: Items) -> str:
    """Return the mode that stands for ckptd: its default, or what was measured instead."""
    return next((mode for mode in ("auto", "off", "on") if CKPTD + mode in items), "auto")


def checkpoint_bars(items: Items, limits: Mapping[str, Spread | None]) -> list[Bar]:
    """Return the bars of `make bench` itself but for restores."""
    mode = chosen(items)
    private = items.get(CKPTD + mode, {}).get("private_mib")
    agent = items.get(CKPTD + mode, {}).get("agent_mib")
    write = limits.get("O_DIRECT write")
    durable = _figure(items, mode, "durable_s")
    return [
        Bar("stall, overlap on / best dcp.async", _beside(items, "on", "stall_s", ASYNC), 0.03),
        Bar("stall, overlap off / memcpy", ratio(_figure(items, "off", "stall_s"), limits.get("memcpy")), 1.25),
        Bar("lost, full loop / best other", _beside(items, mode, "lost_full_s", OTHERS), 0.40),
        Bar("lost, waiting loop / best other", _beside(items, mode, "lost_waiting_s", OTHERS), 0.15),
        Bar("longest step beside a flush / base, full loop", _median(items, mode, "longest_full"), 1.3),
        Bar("longest step beside a flush / base, waiting loop", _median(items, mode, "longest_waiting"), 1.3),
        Bar("the same with the wait for the copy, full loop", _median(items, mode, "longest_all_full"), 1.3),
        Bar("the same with the wait for the copy, waiting loop", _median(items, mode, "longest_all_waiting"), 1.3),
        Bar("rate until durable / O_DIRECT write", _inverse(ratio(durable, write)), 0.85, at_most=False),
        Bar("rate until durable / fastest DCP", _inverse(_beside(items, mode, "durable_s", DCP)), 1.8, at_most=False),
        Bar("rank's private memory, MiB", private, 32),
        Bar("agent's memory besides slots, MiB", agent, 100),
    ]


def restore_bars(restores: Mapping[str, Spread | None], limits: Mapping[str, Spread | None]) -> list[Bar]:
    """Return the bars of ckptd's restores into prepared objects."""
    memory, disk = restores.get("memory"), restores.get("disk")
    return [
        Bar("rate of restore from memory / memcpy", _inverse(ratio(memory, limits.get("memcpy"))), 0.7, at_most=False),
        Bar("rate of restore from disk / O_DIRECT read", _inverse(ratio(disk, limits.get("O_DIRECT read"))), 0.7,
            at_most=False),
    ]  # fmt: skip


def _median(items: Items, mode: str, key: str) -> float | None:
    found = _figure(items, mode, key)
    return found["median"] if found else None
