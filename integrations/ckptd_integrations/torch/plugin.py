"""Names the torch adapter to the agent. Must not import torch: the agent never does."""

from __future__ import annotations

from ckptd.plugin import FrameworkSpec, hookimpl


@hookimpl
def ckptd_frameworks() -> list[FrameworkSpec]:
    """Register the torch adapter."""
    return [
        FrameworkSpec(
            name="torch",
            trigger="torch",
            target="ckptd_integrations.torch.framework:TorchFramework",
            # The first optimizer that a process makes imports torch._dynamo, which takes longer than torch itself.
            preload=("torch.distributed", "torch._dynamo"),
        )
    ]
