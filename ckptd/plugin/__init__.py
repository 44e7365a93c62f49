"""The extension surface: hookspecs, the contracts behind them, and the manager that loads plugins."""

from ckptd.plugin.contracts import Detector, FormatSpec, FrameworkSpec, NodeCheck, NodePlan, TierFactory
from ckptd.plugin.hookspecs import hookimpl

__all__ = ["Detector", "FormatSpec", "FrameworkSpec", "NodeCheck", "NodePlan", "TierFactory", "hookimpl"]
