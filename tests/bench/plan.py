"""What one world of ranks shall measure; crosses to the ranks as JSON. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """What a rank's state looks like."""

    size_mib: float = 512
    tensors: int = 150
    dtype: str = "mixed"
    frozen: float = 0.0
    """Which part of the bytes no optimizer changes, as base weights under LoRA."""
    moments: bool = True
    """Whether an Adam keeps its moments; without, every tensor is a weight and no optimizer is there."""
    replicated: bool = False
    """Whether all ranks hold the same state under the same names, as under DDP."""
    device: str = "cpu"
    """Where it lies: "cpu" or "cuda"."""


@dataclass(frozen=True)
class Plan:
    """Which contender, which state, which phases, how often."""

    contender: str
    folder: str
    phases: tuple[str, ...] = ("memory", "idle", "full", "waiting", "load")
    repeats: int = 5
    ranks: int = 2
    shape: Shape = field(default_factory=Shape)
    quiet_s: float = 1.2
    """How long the quiet loop runs before each checkpoint under a loop."""
    keep_last: int = 1

    @property
    def place(self) -> Path:
        """The world's own folder."""
        return Path(self.folder)

    def to_json(self) -> str:
        """Return one argument of a command line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Rebuild what `to_json` wrote."""
        data = json.loads(text)
        return cls(**{**data, "shape": Shape(**data["shape"]), "phases": tuple(data["phases"])})
