"""Loads plugins and keeps the agent safe from them: a plugin that fails is blocked or quarantined, never fatal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import pluggy

from ckptd.errors import CkptdError, PluginError, StoreError
from ckptd.plugin import hookspecs
from ckptd.plugin.contracts import Detector, FormatSpec, FrameworkSpec, NodeCheck, NodePlan, TierFactory
from ckptd.plugin.formats import Formats
from ckptd.plugin.guarded import GuardedTier
from ckptd.storage.tier import Tier
from ckptd.types import Evidence, RankExit

GROUP = "ckptd"
CALL_LIMIT_S = 1.0
FAULTS_BEFORE_QUARANTINE = 3

_ANYTHING = (Exception, SystemExit)
"""What foreign code may raise, even in answer to a simple question."""

Result = TypeVar("Result")
Report = Callable[[str, str], None]


class PluginManager:
    """All plugins of one agent.

    `blocked` are entry point names that are not loaded (`CKPTD_PLUGINS_BLOCK`). `report(plugin, problem)` is told of
    every fault. Objects that fail or overrun `CALL_LIMIT_S` too often are not called any more.
    """

    def __init__(self, report: Report, blocked: Iterable[str] = (), found: Iterable[EntryPoint] | None = None) -> None:
        self._report = report
        self._faults: dict[str, int] = {}
        self.loaded: list[str] = []
        self.failed: dict[str, str] = {}
        self.blocked = sorted(set(blocked))
        self._pluggy = pluggy.PluginManager(hookspecs.PROJECT)
        self._pluggy.add_hookspecs(hookspecs)
        for entry in entry_points(group=GROUP) if found is None else found:
            if entry.name not in self.blocked:
                self._load(entry)
        self.tiers: list[TierFactory] = self._collect("ckptd_tiers", _is_tier_factory)
        self.detectors: list[Detector] = self._collect("ckptd_detectors", _is_detector)
        self.frameworks: list[FrameworkSpec] = self._collect("ckptd_frameworks", _is_framework_spec)
        self.checks: list[NodeCheck] = self._collect("ckptd_check_node", _is_check)
        self.formats = Formats(self._collect("ckptd_formats", _is_format_spec), _call_format)

    def _load(self, entry: EntryPoint) -> None:
        if entry.name in self.loaded:
            return  # found twice, as an editable install beside a regular one is
        try:
            self._pluggy.register(entry.load(), name=entry.name)
            self._pluggy.check_pending()
        except _ANYTHING as error:  # a foreign module may raise anything while it is imported
            if self._pluggy.has_plugin(entry.name):
                self._pluggy.unregister(name=entry.name)
            self._fail(entry.name, f"{type(error).__name__}: {error}")
        else:
            self.loaded.append(entry.name)

    def _collect(self, hook: str, fits: Callable[[object], bool]) -> list[Result]:
        """Call a hook plugin by plugin, so that one that raises costs nobody else's objects."""
        found: list[Result] = []
        for name in self.loaded:
            plugin = self._pluggy.get_plugin(name)
            function = getattr(plugin, hook, None)
            if function is None:
                continue
            try:
                objects = list(function())
                for item in objects:
                    if not fits(item):
                        raise TypeError(f"{item!r} is nothing to register there")
            except _ANYTHING as error:
                self._fail(name, f"{hook}: {type(error).__name__}: {error}")
            else:
                found += objects
        return found

    def _fail(self, name: str, problem: str) -> None:
        self.failed[name] = problem
        self._report(name, problem)

    def open_tier(self, url: str, options: Mapping[str, Any] | None = None) -> Tier:
        """Open the tier of a URL or path; raises `PluginError` when no plugin knows the scheme."""
        scheme = url.split("://", 1)[0] if "://" in url else ""
        for factory in self.tiers:
            if scheme in factory.schemes:
                return _open(factory, url, options or {})
        schemes = {name for factory in self.tiers for name in factory.schemes}
        known = ", ".join(sorted(f"{name}://" for name in schemes if name)) or "none"
        raise PluginError(
            f"no plugin opens {f'{scheme}:// stores' if scheme else 'plain paths'}",
            hint=f"known schemes: {known}" + ("; plain paths are local folders" if "" in schemes else ""),
        )

    def evidence(self, end: RankExit) -> Evidence | None:
        """Ask every detector about the end of a rank and return the surest claim."""
        claims = [self.guarded(item.name, _judge, item, end) for item in self.detectors]
        return max((claim for claim in claims if claim is not None), key=lambda claim: claim.certainty, default=None)

    def guarded(self, name: str, function: Callable[..., Result | None], *arguments: object) -> Result | None:
        """Call a plugin's object; a fault or overrun is reported and counted, and None returned."""
        begin_s = time.monotonic()
        result = self._attempt(name, function, *arguments)
        took_s = time.monotonic() - begin_s
        if took_s > CALL_LIMIT_S:
            self.overran(name, took_s)
        return result

    def unfit(self, check: NodeCheck, plan: NodePlan) -> str | None:
        """Ask a check of the node, in whatever thread; who waits for it says when it is `overran`."""
        return self._attempt(check.name, _examine, check, plan)

    def quarantined(self, name: str) -> bool:
        """Whether an object of that name has failed so often that it is not called any more."""
        return self._faults.get(name, 0) >= FAULTS_BEFORE_QUARANTINE

    def overran(self, name: str, took_s: float) -> None:
        """Report and count that an object took longer than it may."""
        self._fault(name, f"took {took_s:.1f} s, over the limit of {CALL_LIMIT_S:g} s")

    def _attempt(self, name: str, function: Callable[..., Result | None], *arguments: object) -> Result | None:
        if self.quarantined(name):
            return None
        try:
            return function(*arguments)
        except _ANYTHING as error:
            self._fault(name, f"{type(error).__name__}: {error}")
            return None

    def _fault(self, name: str, problem: str) -> None:
        self._faults[name] = self._faults.get(name, 0) + 1
        if self._faults[name] == FAULTS_BEFORE_QUARANTINE:
            problem += f"; that was fault {FAULTS_BEFORE_QUARANTINE}: it is not called any more"
        self._fail(name, problem)


def _is_tier_factory(item: object) -> bool:
    return isinstance(item, TierFactory)


def _is_framework_spec(item: object) -> bool:
    return isinstance(item, FrameworkSpec)


def _is_format_spec(item: object) -> bool:
    return isinstance(item, FormatSpec)


def _is_detector(item: object) -> bool:
    return isinstance(getattr(item, "name", None), str) and callable(getattr(item, "on_exit", None))


def _is_check(item: object) -> bool:
    return isinstance(getattr(item, "name", None), str) and callable(getattr(item, "check", None))


def _examine(check: NodeCheck, plan: NodePlan) -> str | None:
    reason = check.check(plan)
    if reason is None:
        return None
    if not isinstance(reason, str) or not reason.strip():
        raise TypeError(f"{reason!r} is no reason")
    return " ".join(reason.split())


def _judge(detector: Detector, end: RankExit) -> Evidence | None:
    claim = detector.on_exit(end)
    if claim is not None and not isinstance(claim, Evidence):
        raise TypeError(f"{claim!r} is no evidence")
    return claim


def _call_tier(name: str, what: str, function: Callable[..., Result], *arguments: object, **options: object) -> Result:
    """Call a tier; a fault that its contract does not know becomes a `StoreError`, which callers handle."""
    try:
        return function(*arguments, **options)
    except CkptdError:
        raise
    except _ANYTHING as error:
        raise StoreError(f"tier {name} failed to {what}: {type(error).__name__}: {error}") from error


def _call_format(name: str, function: Callable[..., Result], *arguments: object) -> Result:
    """Call what a format's target is; a fault that its contract does not know becomes a `PluginError`."""
    try:
        return function(*arguments)
    except (CkptdError, OSError):
        raise
    except _ANYTHING as error:
        raise PluginError(f"format {name} failed: {type(error).__name__}: {error}") from error


def _open(factory: TierFactory, url: str, options: Mapping[str, Any]) -> Tier:
    try:
        return GuardedTier(factory.open(url, options), partial(_call_tier, factory.name))
    except CkptdError:
        raise
    except _ANYTHING as error:
        raise PluginError(f"tier {factory.name} can't open {url}: {type(error).__name__}: {error}") from error
