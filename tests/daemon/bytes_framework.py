"""A framework adapter for plain bytes, so that ranks of tests need no torch; plugin and adapter in one module.

State: every `bytearray` is a tensor, everything else is a plain value of JSON. `FAULTS` makes a step of it fail.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from ckptd.client.framework import Membership, OfferedCheckpoint
from ckptd.errors import DamagedError, StateError
from ckptd.plugin import FrameworkSpec, hookimpl
from ckptd.storage import image as shard
from ckptd.storage import manifest
from ckptd.storage.digest import tensor_digest
from ckptd.storage.selection import own_chunk
from ckptd.types import TensorSpan

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

    def bind(self, state: Mapping[str, Any], *, rng: bool, membership: Membership) -> BytesBinding:
        """Bind the named objects."""
        return BytesBinding(dict(state), membership)


class BytesBinding:
    """The `Binding`. Every rank captures all of its state; `replicated` objects are compared by their witness."""

    overlaps_by_default = False

    def __init__(self, state: dict[str, Any], membership: Membership) -> None:
        self.state = state
        self._membership = membership

    def prepare(self, step: int, *, whole: bool = False) -> BytesImage:
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
        return BytesImage(tensors, json.dumps(values).encode(), () if whole else self._membership.replicated or ())

    def number(self, value: object) -> None:
        """Find nothing on a device."""

    def before_optimizer_steps(self, wait: Callable[[], None]) -> None:
        """Do nothing: no copy is ever pending."""

    def count_waits(self, add: Callable[[int], None]) -> None:
        """Do nothing: it can't tell."""

    def restore(self, offered: OfferedCheckpoint) -> None:
        """Fill the state in place, from the rank's own shard, or that of another rank if the job has grown."""
        _fault("restore")
        read = manifest.read(offered.document, "that is offered")
        entries = {
            name: own_chunk(tensor, self._membership.rank, read.world_size) for name, tensor in read.tensors.items()
        }
        opened = offered.open(sorted({chunk.file for chunk in entries.values()}))
        found = {name: _read(name, chunk, opened[chunk.file]) for name, chunk in entries.items()}
        blob = found.pop(shard.VALUES_NAME)
        for name, data in found.items():
            if len(self.state[name]) != len(data):
                raise StateError(f"{name}: {len(self.state[name])} bytes now, {len(data)} before")
        for name, data in found.items():
            self.state[name][:] = data
        span = TensorSpan(shard.VALUES_NAME, "U8", (len(blob),), 0, len(blob))
        self.state.update(json.loads(shard.read_values(memoryview(blob), span)))

    def close(self) -> None:
        """Nothing was changed."""


def _read(name: str, chunk: manifest.Chunk, descriptor: int) -> bytes:
    data = os.pread(descriptor, chunk.end - chunk.begin, chunk.begin)
    if len(data) < chunk.end - chunk.begin:
        raise DamagedError(f"the file {chunk.file} is cut short")
    if chunk.digest is not None and tensor_digest(memoryview(data)).value != chunk.digest:
        raise DamagedError(f"tensor {name!r} is not what was captured")
    return data


class BytesImage:
    """The `PreparedImage`."""

    def __init__(self, tensors: Mapping[str, bytearray], values: bytes, compared: Collection[str]) -> None:
        self._tensors = tensors
        self._values = values
        self._compared = compared
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

    def begin(self, slot: memoryview) -> None:
        """Write everything at once: there is no optimizer whose steps could be waited for."""
        self.write(slot)

    def witness(self) -> Mapping[str, str]:
        """Return the digests of what is said to be the same on all ranks."""
        return {name: tensor_digest(memoryview(self._tensors[name])).value for name in self._compared}


def _fault(where: str) -> None:
    if where in FAULTS:
        FAULTS[where]()
