"""The plugin manager: what is installed is loaded, and what is broken costs only itself."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from ckptd.errors import AgentError, ConfigError, PluginError, StoreError
from ckptd.plugin import manager as manager_module
from ckptd.plugin.manager import FAULTS_BEFORE_QUARANTINE, GROUP, PluginManager
from ckptd.types import Evidence, RankExit

FIRST_PARTY = {"storage_local", "detector_exit", "framework_torch"}
KILLED = RankExit(rank=1, pid=7, returncode=-9, at_s=1.0)

Make = Callable[..., EntryPoint]

GOOD = """
    from ckptd.plugin import TierFactory, hookimpl
    from ckptd.storage.memory import MemoryTier

    @hookimpl
    def ckptd_tiers():
        return [TierFactory("good", ("good",), lambda url, options: MemoryTier())]
"""
DETECTOR = """
    from ckptd.plugin import hookimpl
    from ckptd.types import Evidence

    class Detector:
        name = {name!r}
        calls = 0

        def on_exit(self, end):
            type(self).calls += 1
            {body}

        def claim(self, certainty, summary="mine"):
            return Evidence(self.name, "test", 1, certainty, summary, 1.0)

    @hookimpl
    def ckptd_detectors():
        return [Detector()]
"""


class Reports:
    """What a manager reports, and the callable that it reports to."""

    def __init__(self) -> None:
        self.all: list[tuple[str, str]] = []

    def __call__(self, plugin: str, problem: str) -> None:
        self.all.append((plugin, problem))

    def of(self, plugin: str) -> list[str]:
        """The problems of one plugin."""
        return [problem for name, problem in self.all if name == plugin]


@pytest.fixture
def reports() -> Reports:
    """An empty list of reports."""
    return Reports()


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Write a plugin module and return a real entry point to it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[str] = []

    def make(name: str, source: str) -> EntryPoint:
        module = f"ckptd_test_plugin_{name}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        made.append(module)
        return EntryPoint(name, module, GROUP)

    yield make
    for module in made:
        sys.modules.pop(module, None)


def detector(name: str, body: str) -> str:
    """The source of a plugin with one detector."""
    return DETECTOR.format(name=name, body=body)


# --- first party ------------------------------------------------------------------------------------------------


def test_first_party_plugins_load_through_the_real_entry_points(reports: Reports) -> None:
    """What ships with ckptd is found through the installed entry points, like anyone's, and loads without a fault."""
    manager = PluginManager(reports)
    assert set(manager.loaded) >= FIRST_PARTY
    assert reports.all == []
    assert manager.failed == {}
    assert "local" in [factory.name for factory in manager.tiers]
    assert "exit" in [item.name for item in manager.detectors]
    assert [item.trigger for item in manager.frameworks if item.name == "torch"] == ["torch"]


def test_loading_plugins_does_not_load_torch() -> None:
    """The agent never imports torch: the torch adapter is only named."""
    from ckptd.testing import race

    code = (
        "from ckptd.plugin.manager import PluginManager\nready()\nPluginManager(print)\nprint('torch' in sys.modules)"
    )
    assert race(code, 1) == ["False"]


@pytest.mark.parametrize(("url", "root"), [("/a/b", "/a/b"), ("file:///a/b", "/a/b"), ("file:///a%20b", "/a b")])
def test_the_local_tier_is_opened_by_path_and_url(reports: Reports, url: str, root: str) -> None:
    """A plain path and a file URL open the local tier at that folder."""
    tier = PluginManager(reports).open_tier(url)
    assert (tier.name, tier.url) == ("local", root)


@pytest.mark.parametrize("url", ["file://runs", "file://data/runs", "file://"])
def test_a_file_url_of_a_host_is_refused(reports: Reports, url: str) -> None:
    """With two slashes what is meant as a folder is a host: it must not become another folder in silence."""
    with pytest.raises(ConfigError, match="no folder of this node") as caught:
        PluginManager(reports).open_tier(url)
    assert "three slashes" in str(caught.value.hint)


def test_relative_paths_and_home_become_absolute(reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tier means the same folder whoever uses it from wherever."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir("/tmp")
    manager = PluginManager(reports)
    assert manager.open_tier("runs").url == "/tmp/runs"
    assert manager.open_tier("~/runs").url == "/home/me/runs"


# --- blocking ---------------------------------------------------------------------------------------------------


def test_blocked_plugins_are_not_loaded(reports: Reports) -> None:
    """A plugin that is blocked by name is not there, and that is no fault; the others are."""
    manager = PluginManager(reports, blocked=["detector_exit", "never_heard_of"])
    assert set(manager.loaded) >= FIRST_PARTY - {"detector_exit"}
    assert "detector_exit" not in manager.loaded
    assert [item.name for item in manager.detectors if item.name == "exit"] == []
    assert reports.all == []


def test_a_blocked_plugin_is_not_even_imported(reports: Reports, make: Make) -> None:
    """Blocking is the way out when importing a plugin is what breaks."""
    entry = make("breaks", "raise RuntimeError('imported')")
    manager = PluginManager(reports, blocked=["breaks"], found=[entry])
    assert (manager.loaded, reports.all) == ([], [])
    assert entry.module not in sys.modules


def test_a_plugin_found_twice_is_loaded_once(reports: Reports, make: Make) -> None:
    """An editable install beside a regular one finds a plugin twice; its objects are there once."""
    entry = make("good", GOOD)
    manager = PluginManager(reports, found=[entry, entry])
    assert (manager.loaded, len(manager.tiers), reports.all) == (["good"], 1, [])


# --- plugins that break when they are loaded --------------------------------------------------------------------

_BROKEN = {
    "import error": (
        "import no_such_module_anywhere",
        "ModuleNotFoundError: No module named 'no_such_module_anywhere'",
    ),
    "raises at import": ("raise RuntimeError('boom')", "RuntimeError: boom"),
    "exits at import": ("raise SystemExit(3)", "SystemExit: 3"),
    "syntax error": ("def broken(:", "SyntaxError"),
    "misspelt hook": (GOOD.replace("ckptd_tiers", "ckptd_tierz"), "ckptd_tierz"),
    "unknown argument": (GOOD.replace("ckptd_tiers()", "ckptd_tiers(url)"), "url"),
    "hook raises": (GOOD.replace("return [", "raise RuntimeError('boom')  # ["), "ckptd_tiers: RuntimeError: boom"),
    "hook returns none": (GOOD.replace("return [", "return None  # ["), "ckptd_tiers"),
    "hook returns a string": (GOOD.replace("return [", "return 'good'  # ["), "ckptd_tiers"),
    "hook returns rubbish": (GOOD.replace("return [", "return [1]  # ["), "ckptd_tiers"),
    "hook raises half-way": (GOOD.replace("return [", "yield from [1 / 0]  # ["), "ckptd_tiers: ZeroDivisionError"),
}


@pytest.mark.parametrize("how", sorted(_BROKEN))
def test_a_broken_plugin_costs_only_itself(reports: Reports, make: Make, how: str) -> None:
    """However a plugin breaks, it is reported by name, and the plugins before and after it work."""
    source, says = _BROKEN[how]
    before, after = make("before", GOOD), make("after", detector("after", "return self.claim(1.0)"))
    manager = PluginManager(reports, found=[before, make("broken", source), after])
    assert [factory.name for factory in manager.tiers] == ["good"]
    assert [item.name for item in manager.detectors] == ["after"]
    assert manager.open_tier("good://x").name == "memory"
    assert manager.evidence(KILLED) is not None
    assert {name for name, _ in reports.all} == {"broken"}
    assert says in reports.of("broken")[0]
    assert manager.failed == {"broken": reports.of("broken")[-1]}


def test_one_bad_hook_keeps_the_others_of_the_same_plugin(reports: Reports, make: Make) -> None:
    """A plugin of which one hook raises still gives what its other hooks return."""
    source = GOOD + "\n    @hookimpl\n    def ckptd_detectors():\n        raise RuntimeError('boom')\n"
    manager = PluginManager(reports, found=[make("half", source)])
    assert [factory.name for factory in manager.tiers] == ["good"]
    assert reports.of("half") == ["ckptd_detectors: RuntimeError: boom"]


# --- tiers ------------------------------------------------------------------------------------------------------


def test_an_unknown_scheme_names_the_known_ones(reports: Reports, make: Make) -> None:
    """Who asks for a store that no plugin opens is told which ones there are."""
    manager = PluginManager(
        reports, found=[make("good", GOOD), make("more", GOOD.replace('("good",)', '("more", "")'))]
    )
    with pytest.raises(PluginError, match="no plugin opens s3:// stores") as caught:
        manager.open_tier("s3://bucket/runs")
    assert caught.value.hint == "known schemes: good://, more://; plain paths are local folders"


def test_no_plugin_for_plain_paths(reports: Reports) -> None:
    """With the local tier blocked, a path is refused with words that make sense."""
    manager = PluginManager(reports, found=[])
    with pytest.raises(PluginError, match="no plugin opens plain paths") as caught:
        manager.open_tier("/runs")
    assert caught.value.hint == "known schemes: none"


def test_a_tier_that_can_not_be_opened_is_a_plugin_error(reports: Reports, make: Make) -> None:
    """Whatever a plugin raises while it opens a tier, the user gets an error that names plugin and store."""
    source = GOOD.replace("MemoryTier())", "1 / 0)")
    manager = PluginManager(reports, found=[make("bad", source)])
    with pytest.raises(PluginError, match="can't open good://x: ZeroDivisionError"):
        manager.open_tier("good://x")


def test_what_is_no_tier_is_a_plugin_error(reports: Reports, make: Make) -> None:
    """A factory that hands over what is no tier is noticed when it is opened, not in the middle of a flush."""
    manager = PluginManager(reports, found=[make("bad", GOOD.replace("MemoryTier())", "None)"))])
    with pytest.raises(PluginError, match="tier good can't open good://x"):
        manager.open_tier("good://x")


def test_an_error_of_ours_from_opening_is_passed_on(reports: Reports, make: Make) -> None:
    """A tier that says what is wrong in our words is heard."""
    source = GOOD.replace("lambda url, options: MemoryTier()", "refuse") + (
        "\n    def refuse(url, options):\n        from ckptd.errors import StoreError\n"
        "        raise StoreError('no bucket')\n"
    )
    with pytest.raises(StoreError, match="no bucket"):
        PluginManager(reports, found=[make("bad", source)]).open_tier("good://x")


# --- detectors --------------------------------------------------------------------------------------------------


def test_the_surest_claim_counts(reports: Reports, make: Make) -> None:
    """Of several claims about an end the surest is the evidence; None is no claim."""
    entries = [
        make("unsure", detector("unsure", "return self.claim(0.2)")),
        make("sure", detector("sure", "return self.claim(0.9)")),
        make("silent", detector("silent", "return None")),
    ]
    found = PluginManager(reports, found=entries).evidence(KILLED)
    assert found is not None
    assert found.detector == "sure"
    assert PluginManager(reports, found=[entries[2]]).evidence(KILLED) is None


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("from ckptd.errors import StoreError; raise StoreError('disk')", "StoreError: disk"),
        ("return 'it was the disk'", "no evidence"),
        ("return 7", "no evidence"),
    ],
)
def test_a_detector_that_fails_is_quarantined(reports: Reports, make: Make, body: str, says: str) -> None:
    """Each fault is reported, the other detectors are heard, and after the third it is not called any more."""
    entries = [make("bad", detector("bad", body)), make("good", detector("good", "return self.claim(0.5)"))]
    manager = PluginManager(reports, found=entries)
    for _ in range(FAULTS_BEFORE_QUARANTINE + 3):
        found = manager.evidence(KILLED)
        assert isinstance(found, Evidence)
        assert found.detector == "good"
    assert len(reports.all) == FAULTS_BEFORE_QUARANTINE
    assert all(says in problem for problem in reports.of("bad"))
    assert "not called any more" in reports.of("bad")[-1]
    assert "not called any more" not in reports.of("bad")[0]
    assert sys.modules[entries[0].module].Detector.calls == FAULTS_BEFORE_QUARANTINE
    assert sys.modules[entries[1].module].Detector.calls == FAULTS_BEFORE_QUARANTINE + 3


def test_a_slow_detector_is_counted(reports: Reports, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An overrun is a fault like others, though its answer still counts: the third one ends in quarantine."""
    monkeypatch.setattr(manager_module, "CALL_LIMIT_S", 0.02)
    slow = detector("slow", "import time; time.sleep(0.03); return self.claim(0.5)")
    manager = PluginManager(reports, found=[make("slow", slow)])
    answers = [manager.evidence(KILLED) for _ in range(FAULTS_BEFORE_QUARANTINE + 1)]
    assert [answer is not None for answer in answers] == [True] * FAULTS_BEFORE_QUARANTINE + [False]
    assert all("over the limit of 0.02 s" in problem for problem in reports.of("slow"))
    assert len(reports.all) == FAULTS_BEFORE_QUARANTINE


def test_a_fast_detector_is_not_counted(reports: Reports) -> None:
    """The detector that ships answers a thousand times without a fault, in a fraction of the limit for one call."""
    manager = PluginManager(reports)
    begin_s = time.monotonic()
    for _ in range(1000):
        assert manager.evidence(KILLED) is not None
    assert time.monotonic() - begin_s < manager_module.CALL_LIMIT_S * 5
    assert reports.all == []


def test_reports_reach_the_agents_log(make: Make) -> None:
    """A reporter that itself raises one of our errors is not swallowed: the agent must know that it can't log."""

    def broken(plugin: str, problem: str) -> None:
        raise AgentError(f"can't report {plugin}")

    with pytest.raises(AgentError, match="can't report bad"):
        PluginManager(broken, found=[make("bad", "raise RuntimeError('boom')")])
