"""Names the torch adapter and formats to the agent. Must not import torch: the agent never does."""

from __future__ import annotations

from ckptd.plugin import FormatSpec, FrameworkSpec, hookimpl

_HERE = "ckptd_integrations.torch"


@hookimpl
def ckptd_frameworks() -> list[FrameworkSpec]:
    """Register the torch adapter."""
    return [
        FrameworkSpec(
            name="torch",
            trigger="torch",
            target=f"{_HERE}.framework:TorchFramework",
            # The first optimizer that a process makes imports torch._dynamo, which takes longer than torch itself.
            preload=("torch.distributed", "torch._dynamo"),
        )
    ]


@hookimpl
def ckptd_formats() -> list[FormatSpec]:
    """Register what torch's world keeps its states in; safetensors needs no torch."""
    return [
        FormatSpec(
            name="safetensors",
            about="a file of tensors for each state",
            exporter="ckptd.storage.export_safetensors:export_safetensors",
            importer=f"{_HERE}.import_safetensors:import_safetensors",
            signs=("*.safetensors", "*.safetensors.index.json"),
            splits=True,
        ),
        FormatSpec(
            name="dcp",
            about="a folder of torch.distributed.checkpoint",
            exporter=f"{_HERE}.dcp_format:export_dcp",
            importer=f"{_HERE}.dcp_format:import_dcp",
            signs=(".metadata",),
            extra="torch",
        ),
        FormatSpec(
            name="torch",
            about="a file of torch.save",
            exporter=f"{_HERE}.torch_format:export_torch",
            importer=f"{_HERE}.torch_format:import_torch",
            signs=("*.pt", "*.pth", "*.bin", "*.ckpt"),
            extra="torch",
        ),
    ]
