"""A framework adapter for plain bytes, so that ranks of tests need no torch; plugin and adapter in one module.

State: every `bytearray` is a tensor, everything else is a plain value of JSON. `FAULTS` makes a step of it fail.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from ckptd.errors import DamagedError, StateError
from ckptd.plugin import FrameworkSpec, hookimpl
from ckptd.storage import image as shard
from ckptd.storage.digest import digest

FAULTS: dict[str, Callable[[], object]] = {}
"""By "prepare", "write" or "restore": called there, to raise or to look."""
NAME = "framework_bytes"
ROOT = Path(__file__).resolve().parents[2]


def contents(step: int, size: int) -> bytes:
    """Return what the `data` of a puppet holds after `step`."""
    return (bytes(range(256)) * (size // 256 + 2))[step % 256 :][:size]


@hookimpl
def ckptd_frameworks() -> list[FrameworkSpec]:
    """Register the adapter; every rank has imported its trigger."""
    return [FrameworkSpec("bytes", "ckptd", f"{__name__}:BytesFramework")]


def entry_points() -> list[EntryPoint]:
    """What an agent in the test's own process loads: this adapter instead of that of torch."""
    return [
        EntryPoint(NAME, __name__, "ckptd"),
        EntryPoint("storage_local", "ckptd_plugins.storage_local", "ckptd"),
        EntryPoint("detector_exit", "ckptd_plugins.detector_exit", "ckptd"),
    ]


def install(folder: Path) -> dict[str, str]:
    """Install the adapter below a folder as pip would; return the environment in which agents and ranks find it."""
    info = folder / "bytes_framework-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bytes-framework\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ckptd]\n{NAME} = {__name__}\n")
    return {"PYTHONPATH": f"{folder}:{ROOT}", "CKPTD_PLUGINS_BLOCK": "framework_torch"}


class BytesFramework:
    """The `Framework`."""

    def bind(self, state: Mapping[str, Any], *, rng: bool) -> BytesBinding:
        """Bind the named objects."""
        return BytesBinding(dict(state))


class BytesBinding:
    """The `Binding`."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def prepare(self) -> BytesImage:
        """Collect the state; a value that JSON can't hold is refused by name."""
        _fault("prepare")
        tensors = {name: value for name, value in self.state.items() if isinstance(value, bytearray)}
        values: dict[str, Any] = {}
        for name, value in self.state.items():
            if name not in tensors:
                try:
                    json.dumps(value)
                except TypeError as error:
                    raise StateError(f"state {name!r} is a {type(value).__name__}, which can't be captured") from error
                values[name] = value
        return BytesImage(tensors, json.dumps(values).encode())

    def restore(self, image: memoryview, digests: Mapping[str, str] | None) -> None:
        """Fill the state in place."""
        _fault("restore")
        layout = shard.parse(image)
        for span in layout.spans:
            if digests is not None and digest(image[span.begin : span.end]) != digests[span.name]:
                raise DamagedError(f"tensor {span.name!r} is not what was captured")
        for span in layout.spans[:-1]:
            if len(self.state[span.name]) != span.end - span.begin:
                raise StateError(f"{span.name}: {len(self.state[span.name])} bytes now, {span.end - span.begin} before")
        for span in layout.spans[:-1]:
            self.state[span.name][:] = image[span.begin : span.end]
        self.state.update(json.loads(shard.read_values(image, layout.values)))


class BytesImage:
    """The `PreparedImage`."""

    def __init__(self, tensors: Mapping[str, bytearray], values: bytes) -> None:
        self._tensors = tensors
        self._values = values
        specs = [shard.TensorSpec(name, "U8", (len(value),)) for name, value in tensors.items()]
        self._layout = shard.plan(specs, len(values), {"format": "pt", "ckptd.framework": "bytes"})
        self.image_bytes = self._layout.image_bytes

    def write(self, slot: memoryview) -> None:
        """Write the image, the way a careless adapter would: with views that a traceback keeps alive."""
        header = slot[: len(self._layout.header)]
        header[:] = self._layout.header
        for span in self._layout.spans[:-1]:
            place = slot[span.begin : span.end]
            place[:] = self._tensors[span.name]
        _fault("write")
        shard.write_values(slot, self._layout.values, self._values)


def _fault(where: str) -> None:
    if where in FAULTS:
        FAULTS[where]()
