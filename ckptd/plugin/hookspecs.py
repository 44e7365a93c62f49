"""The whole extension surface. Hooks only register objects; the agent calls those objects itself.

Implement a hook with `@ckptd.plugin.hookimpl` in a module, and name the module in the entry point group ``ckptd``.
"""

from __future__ import annotations

import pluggy

from ckptd.plugin.contracts import Detector, FormatSpec, FrameworkSpec, NodeCheck, TierFactory

PROJECT = "ckptd"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def ckptd_tiers() -> list[TierFactory]:  # type: ignore[empty-body]
    """Return factories of storage tiers by URL scheme."""


@hookspec
def ckptd_detectors() -> list[Detector]:  # type: ignore[empty-body]
    """Return detectors, called for everything that the agent observes of a job's ranks."""


@hookspec
def ckptd_frameworks() -> list[FrameworkSpec]:  # type: ignore[empty-body]
    """Return the framework adapters that ranks may use to capture and restore their objects."""


@hookspec
def ckptd_formats() -> list[FormatSpec]:  # type: ignore[empty-body]
    """Return the formats that `ckptctl export` and `import` know."""


@hookspec
def ckptd_check_node() -> list[NodeCheck]:  # type: ignore[empty-body]
    """Return checks of the node, called before each generation of a job that the agent starts itself."""
