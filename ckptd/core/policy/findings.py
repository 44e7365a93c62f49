"""Which rank the others wait for, and why: looks at all ranks in, one line for each and the culprit out.

Ranks run in lock-step, so a job that stands still shows one rank that does something else, or two that wait for
different things. Where nothing tells them apart, nobody is blamed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ckptd.core.policy.activities import Activity, Doing, Look, activity

_FAULTS = (Doing.GONE, Doing.STOPPED, Doing.BLOCKED)
_OWN = (Doing.ELSEWHERE, Doing.UNKNOWN)
_MAY_WAIT = ("waits for a socket", "waits for the network", "waits for a connection")
"""What a rank may well be doing that waits for another one, by means that nobody knows here."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Who is to blame, why, and what each rank was doing."""

    culprit: int | None
    """None when nothing tells the ranks apart."""
    reason: str
    lines: Mapping[int, str]
    """One line for each rank."""


def judge(looks: Iterable[Look]) -> Findings:
    """Say which rank the others wait for."""
    seen = sorted(looks, key=lambda look: look.rank)
    doing = {look.rank: activity(look) for look in seen}
    lines = {rank: item.words for rank, item in doing.items()}
    steps = {look.rank: look.step for look in seen}
    if not doing:
        return Findings(None, "no rank was there to be looked at", {})
    for fault in _FAULTS:
        group = [rank for rank, item in doing.items() if item.doing is fault]
        if group:
            behind = _behind(group, steps)
            rank = group[0] if behind is None else behind
            return Findings(rank, f"rank {rank} {lines[rank]}", lines)
    return _among_the_living(doing, lines, steps)


def _among_the_living(
    doing: Mapping[int, Activity], lines: Mapping[int, str], steps: Mapping[int, int | None]
) -> Findings:
    waiting = [rank for rank, item in doing.items() if item.doing is Doing.WAITING]
    for kind in _OWN:
        own = [rank for rank, item in doing.items() if item.doing is kind]
        if not own or (kind is Doing.UNKNOWN and not waiting and len(doing) > 1):
            continue
        active = [rank for rank in own if not doing[rank].words.startswith(_MAY_WAIT)]
        rank = own[0] if len(own) == 1 else _behind(own, steps)
        if rank is None and len(active) == 1:
            rank = active[0]
        if rank is None and waiting:
            rank = own[0]
        if rank is not None:
            others = f", while {_names(waiting)} for it in a collective" if waiting else ""
            return Findings(rank, f"rank {rank} {lines[rank]}{others}", lines)
    if len(doing) == 1:
        (rank,) = doing
        return Findings(rank, f"rank {rank} {lines[rank]}", lines)
    rank = _alone(doing) if len(waiting) == len(doing) else None
    if rank is not None:
        return Findings(rank, f"rank {rank} {lines[rank]}, the others in something else", lines)
    rank = _behind(list(doing), steps)
    if rank is not None:
        return Findings(rank, f"rank {rank} is behind the others: it {lines[rank]}", lines)
    if len(waiting) == len(doing) and len({item.awaits for item in doing.values()}) > 1:
        examples: dict[str, str] = {}
        for rank, item in doing.items():
            examples.setdefault(item.awaits, f"rank {rank} {item.words}")
        shown = "; ".join(examples.values())
        return Findings(None, f"the ranks wait for each other in different collectives: {shown}", lines)
    if any(item.doing is Doing.ELSEWHERE for item in doing.values()):
        return Findings(None, "no rank waits for another and none is behind: each does something of its own", lines)
    return Findings(None, "all ranks do the same: nothing tells them apart", lines)


def _alone(doing: Mapping[int, Activity]) -> int | None:
    """Return the one rank that waits in another collective than all others do."""
    counts = Counter(item.awaits for item in doing.values())
    rare = [rank for rank, item in doing.items() if counts[item.awaits] == 1]
    return rare[0] if len(counts) == 2 and len(rare) == 1 else None


def _behind(ranks: list[int], steps: Mapping[int, int | None]) -> int | None:
    """Return the one of `ranks` that has finished fewer steps than any other rank of them."""
    known = sorted((step, rank) for rank in ranks if (step := steps[rank]) is not None)
    if len(known) != len(ranks) or (len(known) > 1 and known[0][0] == known[1][0]):
        return None
    return known[0][1]


def _names(ranks: list[int]) -> str:
    numbers = ", ".join(map(str, ranks))
    return f"rank {numbers} waits" if len(ranks) == 1 else f"ranks {numbers} wait"
