"""Names the torch adapter to the agent. Must not import torch: the agent never does."""

from __future__ import annotations

from ckptd.plugin import FrameworkSpec, hookimpl


@hookimpl
def ckptd_frameworks() -> list[FrameworkSpec]:
    """Register the torch adapter."""
    return [FrameworkSpec("torch", "torch", "ckptd_integrations.torch.framework:TorchFramework")]
