"""Capture: from a harvest to an image in a slot, with what does not change from step to step kept ready."""

from __future__ import annotations

import ctypes
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import attrgetter, eq
from typing import Any

import torch

from ckptd.errors import invariant
from ckptd.storage.image import Layout, TensorSpec, plan, write_values
from ckptd_integrations.torch.copying import copy_bytes
from ckptd_integrations.torch.tensors import DTYPES, TensorTable
from ckptd_integrations.torch.tree import TREE_VERSION

METADATA: Mapping[str, str] = {
    "format": "pt",
    "ckptd.framework": "torch",
    "ckptd.tree": str(TREE_VERSION),
    "torch": str(torch.__version__),
}
"""What the header of an image says about its contents; `format` is what the safetensors world looks for."""

_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Placement:
    """A layout, and in the order of the harvest where each tensor begins in it and how many bytes it has."""

    layout: Layout
    offsets: list[int]
    sizes: list[int]

    @property
    def values_capacity(self) -> int:
        """How long the values blob may become; its place begins with its length."""
        values = self.layout.values
        return values.end - values.begin - _LENGTH_BYTES


class LayoutCache:
    """Reuses the layout of the previous capture while names, dtypes and shapes are the same and the values fit.

    A layout of 10,000 tensors takes 50 ms to make, and the agent has to be told of a new one.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._dtypes: list[str] = []
        self._shapes: list[tuple[int, ...]] = []
        self._placement: Placement | None = None

    def place(self, table: TensorTable, values_bytes: int) -> Placement:
        """Return where `table` and a values blob of `values_bytes` go."""
        current = self._placement
        if current is not None and self._is_same(table) and values_bytes <= current.values_capacity:
            return current
        self._names, self._dtypes = table.names, table.dtypes
        self._shapes = [tuple(tensor.shape) for tensor in table.tensors]
        columns = zip(self._names, self._dtypes, self._shapes, strict=True)
        specs = [TensorSpec(name, dtype, shape) for name, dtype, shape in columns]
        # Room to grow, because lengths of numbers and lists change from step to step and a new layout costs more.
        layout = plan(specs, values_bytes + values_bytes // 4 + 1024, METADATA)
        spans = {span.name: span for span in layout.spans}
        self._placement = Placement(
            layout, [spans[name].begin for name in table.names], [spec.size_bytes for spec in specs]
        )
        return self._placement

    def _is_same(self, table: TensorTable) -> bool:
        # Shapes are compared as they are made: 10,000 living tuples would set off the garbage collector each time.
        return (
            self._names == table.names
            and self._dtypes == table.dtypes
            and all(map(eq, map(attrgetter("shape"), table.tensors), self._shapes))
        )


def pack_values(entries: Sequence[tuple[str, Any]], table: TensorTable) -> bytes:
    """Return the values blob: the trees of all names, and what the header can't say about tensors.

    The trees travel as one text inside what `torch.save` writes. Its pickler and the one that is safe to load again
    call into Python for each node, which for a large optimizer takes longer than copying the tensors.
    """
    document = {
        "entries": entries,
        "aliases": table.aliases,
        "views": {name: tuple(view) for name, view in table.views.items()},
    }
    blob = io.BytesIO()
    text = json.dumps(document, separators=(",", ":"), check_circular=False)
    torch.save({"version": TREE_VERSION, "tree": text}, blob)
    return blob.getvalue()


class TorchImage:
    """The state of one boundary, collected but not yet copied: the `PreparedImage` of this integration.

    It refers to the live tensors. Write it before training goes on.
    """

    def __init__(self, placement: Placement, table: TensorTable, values: bytes) -> None:
        self._placement = placement
        self._table = table
        self._values = values

    @property
    def layout(self) -> Layout:
        """The layout; the same object as before when nothing but the contents changed."""
        return self._placement.layout

    @property
    def image_bytes(self) -> int:
        """How large a slot this needs."""
        return self._placement.layout.image_bytes

    def write(self, slot: memoryview) -> None:
        """Write the complete shard image to the start of `slot`.

        No view of `slot` outlives the call. What a writer that dies midway leaves is no image: only sealing makes it
        one. Raises `StateError` when a tensor got other memory after `prepare`.
        """
        # Addresses are not checked by anybody later.
        fits = slot.nbytes >= self.image_bytes and slot.contiguous and not slot.readonly
        invariant(fits, f"a slot of {slot.nbytes} bytes can't take an image of {self.image_bytes}")
        with slot.cast("B") as target:
            header = self._placement.layout.header
            target[: len(header)] = header
            self._write_tensors(target)
            write_values(target, self._placement.layout.values, self._values)

    def _write_tensors(self, target: memoryview) -> None:
        table, placement = self._table, self._placement
        pointers = table.current_pointers()
        offsets, sizes = placement.offsets, placement.sizes
        if table.odd:
            odd = set(table.odd)
            direct = [index not in odd for index in range(len(sizes))]
            pointers = list(compress(pointers, direct))
            offsets, sizes = list(compress(offsets, direct)), list(compress(sizes, direct))
        anchor = ctypes.c_char.from_buffer(target)
        try:
            base = ctypes.addressof(anchor)
            copy_bytes([base + offset for offset in offsets], pointers, sizes)
        finally:
            del anchor  # It holds the slot's memory; a traceback must not.
        if table.odd:
            self._convert(target)

    def _convert(self, target: memoryview) -> None:
        table, placement = self._table, self._placement
        elements = torch.frombuffer(target, dtype=torch.uint8)
        with torch.no_grad():
            for index in table.odd:
                begin, size = placement.offsets[index], placement.sizes[index]
                if size:
                    place = elements[begin : begin + size].view(DTYPES[table.dtypes[index]])
                    # From a CUDA tensor this waits until the elements have arrived.
                    place.view(table.tensors[index].shape).copy_(table.tensors[index])
