"""Promises against figures, and how a run is laid out."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bench.bars import Bar, checkpoint_bars, chosen, restore_bars
from tests.bench.catalogue import CKPTD, NAMES, NOTHING, pick
from tests.bench.compare import arguments, share, summarise, worlds
from tests.bench.damage import verdict
from tests.bench.measure import spread
from tests.bench.plan import Plan, Shape


def _item(**values: float) -> dict[str, Any]:
    item: dict[str, Any] = {key: spread([value]) for key, value in values.items()}
    return {**item, "private_mib": 10.0, "agent_mib": 40.0}


def test_bars_compare_with_the_best_of_the_others() -> None:
    """Each ratio is taken to the fastest contender of its group, and to the machine's limit."""
    items = {
        CKPTD + "on": _item(stall_s=0.003),
        CKPTD + "off": _item(stall_s=0.11),
        CKPTD + "auto": _item(stall_s=0.1, durable_s=0.5, lost_full_s=0.2, lost_waiting_s=0.1, longest_full=1.4),
        "dcp.save": _item(stall_s=1.0, durable_s=1.0, lost_full_s=1.0, lost_waiting_s=1.0),
        "dcp.async thread": _item(stall_s=0.2, durable_s=1.5, lost_full_s=0.4, lost_waiting_s=0.5),
    }
    limits = {"memcpy": spread([0.1]), "O_DIRECT write": spread([0.45])}
    figures: dict[str, Any] = {bar.what: (bar.figure, bar.holds) for bar in checkpoint_bars(items, limits)}
    assert figures["stall, overlap on / best dcp.async"] == (pytest.approx(0.015), True)
    assert figures["stall, overlap off / memcpy"] == (pytest.approx(1.1), True)
    assert figures["lost, full loop / best other"] == (pytest.approx(0.5), False)
    assert figures["lost, waiting loop / best other"] == (pytest.approx(0.2), False)
    assert figures["longest step beside a flush / base, full loop"] == (1.4, False)
    assert figures["longest step beside a flush / base, waiting loop"] == (None, None)
    assert figures["rate until durable / O_DIRECT write"] == (pytest.approx(0.9), True)
    assert figures["rate until durable / fastest DCP"] == (pytest.approx(2.0), True)


def test_bars_without_figures_are_not_kept() -> None:
    """What was not measured is said to be so, and never counts as kept."""
    found = [*checkpoint_bars({}, {}), *restore_bars({}, {})]
    assert {bar.holds for bar in found} == {None}
    assert {bar.row()["holds"] for bar in found} == {"not measured"}


def test_a_bar_knows_its_direction() -> None:
    """A bound is an upper or a lower one, and its row says which."""
    assert Bar("", 2, 2).holds
    assert not Bar("", 2, 3, at_most=False).holds
    assert Bar("", 2, 3, at_most=False).row()["bound"] == ">= 3"


def test_the_default_mode_stands_for_ckptd() -> None:
    """Automatic choice is what users get; without it, what was measured."""
    assert chosen({CKPTD + "off": {}, CKPTD + "auto": {}}) == "auto"
    assert chosen({CKPTD + "off": {}}) == "off"


@pytest.mark.parametrize(("repeats", "rounds"), [(5, 2), (1, 1), (6, 3), (7, 4)])
def test_rounds_share_all_repetitions(repeats: int, rounds: int) -> None:
    """No repetition is lost or made twice by dividing them among rounds."""
    assert sum(share(repeats, rounds, number) for number in range(rounds)) == repeats


@pytest.mark.parametrize("name", NAMES)
def test_every_contender_is_measured_in_each_kind(name: str) -> None:
    """Memory is looked at once, stall and durability in every round; loads only where a rank loads by itself."""
    first = [phase for world in worlds(name, first=True) for phase in world]
    later = [phase for world in worlds(name, first=False) for phase in world]
    assert first.count("memory") == 1
    assert "memory" not in later
    assert first.count("idle") == later.count("idle") == 1
    assert ("load cold" in first) is (not name.startswith(CKPTD) and name != NOTHING)


def test_a_plan_crosses_as_json() -> None:
    """What the ranks get is what was meant."""
    plan = Plan("dcp.save", "/tmp/x", ("idle",), 3, 2, Shape(16, 30, "bf16", frozen=0.5))
    assert Plan.from_json(plan.to_json()) == plan


def test_figures_of_rounds_are_put_together() -> None:
    """A contender's row has every repetition of every round, each as slow as its slower rank."""

    def turn(*stalls: float) -> dict[str, Any]:
        idle = [
            {"stall_s": each, "durable_s": 1.0, "rank_cpu_s": 0.1, "beside_cpu_s": 0.2, "written_bytes": 50}
            for each in stalls
        ]
        slow = [{**each, "stall_s": each["stall_s"] * 2} for each in idle]
        memory = {"private_bytes": 2**20, "shared_bytes": 0, "beside_private_bytes": 0, "agent_bytes": 0}
        ranks = [{"state_bytes": 50, "idle": one, "memory": memory} for one in (idle, slow)]
        return {"ranks": ranks, "other_cores": 0.1}

    item = summarise("dcp.save", [turn(1.0, 2.0), turn(3.0)])
    assert item["stall_s"] == {"median": 4.0, "min": 2.0, "max": 6.0, "n": 3}
    assert item["lost_full_s"] == item["stall_s"]  # training stands still, and nothing else is lost
    assert item["written"] == 0.5
    assert item["rank_cpu_s"]["median"] == pytest.approx(0.2)  # both ranks together
    assert item["private_mib"] == 1.0


def test_quick_runs_are_short() -> None:
    """`--quick` limits contenders and repetitions unless others are asked for."""
    quick = arguments(["--quick"])
    assert (quick.repeat, quick.rounds) == (2, 1)
    assert len(pick(quick.only)) < len(NAMES)
    assert arguments([]).repeat >= 5
    assert pick(None) == list(NAMES)


def test_a_load_is_judged_by_its_bytes() -> None:
    """Refusing and an older good copy are right answers; wrong bytes and a silent fresh start are not."""
    assert verdict(5, [], 7, "DamagedError").startswith("refused")
    assert verdict(0, [], 7, "") == "STARTED ANEW, no word"
    assert verdict(0, [], 7, "", committed=False).startswith("begins anew")
    assert verdict(0, [{"right": False, "step": 7}], 7, "").startswith("LOADED WRONG")
    assert verdict(0, [{"right": True, "step": 7}], 7, "") == "loads, right"
    assert "older good copy" in verdict(0, [{"right": True, "step": 3}], 7, "")
