"""Who can be measured here, found out without importing torch: the process that starts ranks stays free of threads."""

from __future__ import annotations

import importlib.util
from pathlib import Path

CKPTD = "ckptd overlap="
NOTHING = "no checkpoint (noise)"
TORCH = (
    "torch.save + fsync",
    "dcp.save",
    "dcp.async thread",
    "dcp.async thread, kept stager",
    "dcp.async thread, staged beside",
    "dcp.async process",
    "dcp.async process, kept stager",
)
PEERS = {"DLRover Flash Checkpoint": "dlrover", "nvidia-resiliency-ext": "nvidia_resiliency_ext"}
MODES = ("on", "off", "auto")
NAMES = (NOTHING, *TORCH, *PEERS, *(CKPTD + mode for mode in MODES))


def is_ckptd(name: str) -> bool:
    """Whether a contender is ckptd, whose ranks `ckptctl run` starts."""
    return name.startswith(CKPTD)


def why_not(name: str, device: str = "cpu") -> str | None:
    """Return why a contender can't be measured here, None when it can."""
    if name.endswith("staged beside") and device == "cpu":
        return "its staging needs a CUDA device"
    package = PEERS.get(name)
    if package and importlib.util.find_spec(package) is None:
        return "not installed"
    if name == "nvidia-resiliency-ext" and not Path("/dev/nvidiactl").exists():
        return "installed, but its copy needs a CUDA device"
    return None


def pick(only: list[str] | None) -> list[str]:
    """Return the contenders whose name contains one of `only`, all when there is none."""
    return [name for name in NAMES if not only or any(part in name for part in only)]
