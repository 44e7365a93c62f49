"""The look at the node: every check in a thread of its own, with its limit, and never more than one of a kind."""

from __future__ import annotations

import asyncio
import textwrap
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from ckptd.config import JobConfig
from ckptd.core.job import JobMachine, JobSpec
from ckptd.core.policy.gate import Unfit
from ckptd.daemon import gate as gate_module
from ckptd.daemon.arena import Arena, Budget
from ckptd.daemon.gate import Gate
from ckptd.journal import JobEntry, Life
from ckptd.plugin.manager import FAULTS_BEFORE_QUARANTINE, GROUP, PluginManager
from ckptd.storage.memory import MemoryTier
from ckptd.store_config import StoreConfig
from ckptd.tiers import JobTier
from ckptd_plugins.storage_local import LocalTier

CHECK = """
    import threading
    from ckptd.plugin import hookimpl

    release, plans, threads = threading.Event(), [], []

    class Check:
        name = {name!r}

        def check(self, plan):
            plans.append(plan)
            threads.append(threading.current_thread())
            {body}

    @hookimpl
    def ckptd_check_node():
        return [Check()]
"""
Make = Callable[..., tuple[Gate, dict[str, Any]]]


@pytest.fixture
def reports() -> list[tuple[str, str]]:
    """What the plugin manager reports."""
    return []


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reports: list[tuple[str, str]]) -> Iterator[Make]:
    """Return a gate with checks of the given names and bodies, and their modules."""
    import sys

    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[str] = []

    def build(
        *, tier: Any = None, before: JobEntry | None = None, config: dict[str, Any] | None = None, **checks: str
    ) -> tuple[Gate, dict[str, Any]]:
        entries = []
        for name, body in checks.items():
            module = f"ckptd_test_check_{name}"
            (tmp_path / f"{module}.py").write_text(textwrap.dedent(CHECK.format(name=name, body=body)))
            made.append(module)
            entries.append(EntryPoint(name, module, GROUP))
        plugins = PluginManager(lambda *report: reports.append(report), found=entries)
        settings = JobConfig("job", ("train.py",), (StoreConfig("/runs"),), **{"nproc": 2, **(config or {})})
        budget = Budget()
        tiers = [JobTier("first", tier or MemoryTier(), StoreConfig("/runs"))]
        arena, machine = Arena("job", budget, settings.slots), JobMachine(JobSpec("job", 2, 1.0))
        gate = Gate(plugins, settings, tiers, arena, machine, before=before)
        return gate, {name: sys.modules[f"ckptd_test_check_{name}"] for name in checks}

    yield build
    for module in made:
        if module in sys.modules:
            sys.modules[module].release.set()
            for thread in sys.modules.pop(module).threads:
                thread.join()


def test_what_checks_find_is_told_with_their_names(make: Make, reports: list[tuple[str, str]]) -> None:
    """Reasons come back in the order of the checks, in one line; those that find nothing say nothing."""
    gate, modules = make(one="return None", two="return 'no\\n  room'", three="return 'too hot'")
    assert asyncio.run(gate.look()).unfit == (Unfit("two", "no room"), Unfit("three", "too hot"))
    assert reports == []
    assert threading.current_thread() not in modules["one"].threads


def test_two_checks_of_one_name_are_both_asked(make: Make) -> None:
    """A plugin that calls its check like another one's takes nothing away from it."""
    gate, modules = make(one="return None", two="return 'too hot'")
    for module in modules.values():
        module.Check.name = "disk"
    for _ in range(2):
        assert asyncio.run(gate.look()).unfit == (Unfit("disk", "too hot"),)


def test_without_checks_every_node_is_fit(make: Make) -> None:
    """A gate that has nothing to ask lets everything through."""
    gate, _ = make()
    assert asyncio.run(gate.look()).unfit == ()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("return True", "True is no reason"),
        ("return ' '", "' ' is no reason"),
    ],
)
def test_a_check_that_fails_holds_nothing_up(make: Make, reports: list[tuple[str, str]], body: str, says: str) -> None:
    """A fault of a check is reported, not taken for a fault of the node, and after the third it is not asked again."""
    gate, modules = make(bad=body, good="return 'too hot'")
    for _ in range(FAULTS_BEFORE_QUARANTINE + 2):
        assert asyncio.run(gate.look()).unfit == (Unfit("good", "too hot"),)
    assert len(reports) == FAULTS_BEFORE_QUARANTINE
    assert all(says in problem for _, problem in reports)
    assert len(modules["bad"].plans) == FAULTS_BEFORE_QUARANTINE


def test_a_check_that_hangs_is_waited_for_no_longer_than_its_limit(
    make: Make, reports: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check stuck in a driver is reported once, holds nothing up, and is not asked again while it is stuck."""
    monkeypatch.setattr(gate_module, "CALL_LIMIT_S", 0.05)
    gate, modules = make(stuck="release.wait()", good="return 'too hot'")

    async def twice() -> None:
        assert (await gate.look()).unfit == (Unfit("good", "too hot"),)
        assert (await gate.look()).unfit == (Unfit("good", "too hot"),)
        assert len(modules["stuck"].plans) == 1
        assert [(name, "over the limit" in problem) for name, problem in reports] == [("stuck", True)]
        modules["stuck"].release.set()
        while len(modules["stuck"].plans) < 2:
            await gate.look()

    asyncio.run(twice())


def test_a_check_that_outlives_the_loop_harms_nobody(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent ends while a check is stuck, and the check's late answer goes nowhere."""
    monkeypatch.setattr(gate_module, "CALL_LIMIT_S", 0.01)
    failures: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    gate, modules = make(stuck="release.wait()")
    asyncio.run(gate.look())
    modules["stuck"].release.set()
    for thread in modules["stuck"].threads:
        assert thread.daemon
        thread.join()
    assert failures == []


# --- what is about to start -------------------------------------------------------------------------------------


def entry(slot_bytes: int, nproc: int = 2) -> JobEntry:
    """Return what the journal knows of a job that ran before."""
    return JobEntry("job", {"nproc": nproc}, {}, 1, "", 0.0, Life(slot_bytes=slot_bytes))


def test_a_check_is_told_what_is_about_to_start(make: Make, tmp_path: Path) -> None:
    """The plan names the job, its ranks, where it writes and the environment that its ranks will see."""
    tier = LocalTier(tmp_path / "runs")
    gate, _ = make(tier=tier, config={"env": {"CUDA_VISIBLE_DEVICES": "3"}})
    plan = gate.plan()
    assert (plan.job, plan.ranks, plan.folders, plan.restarts) == ("job", 2, (str(tmp_path / "runs"),), False)
    assert plan.env["CUDA_VISIBLE_DEVICES"] == "3"
    assert "PATH" in plan.env
    assert plan.memory_left_bytes > 0


@pytest.mark.parametrize(
    ("before", "slots", "needs"),
    [(None, 2, 0), (entry(1000), 2, 2000), (entry(1000), 1, 1000), (entry(1000, nproc=4), 2, 0), (entry(0), 2, 0)],
)
def test_the_memory_that_the_job_had(make: Make, before: JobEntry | None, slots: int, needs: int) -> None:
    """What the slots took the last time is what they need now, unless the ranks are another number."""
    gate, _ = make(before=before, config={"slots": slots})
    assert gate.plan().memory_bytes == needs


def test_slots_that_are_there_need_no_memory(make: Make) -> None:
    """A restart of the same agent has its slots already, whatever the run before had."""
    gate, _ = make(before=entry(2**40))
    gate._arena.reserve(0, 4096, ())
    try:
        assert gate.plan().memory_bytes == 0
        assert gate._arena.slot_bytes >= 4096
    finally:
        gate._arena.close()


def test_several_disks_are_named_one_by_one(make: Make, tmp_path: Path) -> None:
    """A store of several disks is told by its folders; one folder with a comma in its name stays one."""
    (tmp_path / "a,b").mkdir()
    comma = LocalTier(tmp_path / "a,b")
    several = PluginManager(print).open_tier(f"{tmp_path}/a,{tmp_path}/b")
    assert make(tier=comma)[0].plan().folders == (f"{tmp_path}/a,b",)
    assert make(tier=several)[0].plan().folders == (f"{tmp_path}/a", f"{tmp_path}/b")
