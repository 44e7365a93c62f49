"""Capture: from a harvest to an image in a slot, at the boundary or beside training."""

from __future__ import annotations

import ctypes
import io
import json
from collections.abc import Sequence
from functools import partial
from itertools import compress
from operator import add
from typing import Any, NamedTuple

import torch

from ckptd.errors import invariant
from ckptd.storage.image import Layout, write_values
from ckptd_integrations.torch.copying import copy_bytes
from ckptd_integrations.torch.cuda import DeviceCopies, PageLocks
from ckptd_integrations.torch.layouts import Columns, LayoutCache, Placed, Placement, Routes, joined
from ckptd_integrations.torch.overlap import CopyThread, PendingCopy, StepHook, Watch
from ckptd_integrations.torch.roles import Roles
from ckptd_integrations.torch.tensors import DTYPES, TensorTable
from ckptd_integrations.torch.values import TREE_VERSION
from ckptd_integrations.torch.witness import Witness, narrowed


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


class Means(NamedTuple):
    """What captures of one binding have in common."""

    layouts: LayoutCache
    hook: StepHook
    locks: PageLocks
    thread: CopyThread


class TorchImage:
    """The state of one boundary, collected but not yet copied: the `PreparedImage` of this integration.

    It refers to the live tensors. Write it before training goes on.
    """

    def __init__(
        self, step: int, placement: Placement, *, table: TensorTable, roles: Roles, values: bytes, means: Means
    ) -> None:
        self._step = step
        self._placement = placement
        self._table = table
        self._roles = roles
        self._values = values
        self._means = means
        self._witness: Witness | None = None

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
        routes = self._routes()
        host, device = joined(routes.now, routes.later), joined(routes.device_now, routes.device_later)
        copies = self._write_now(slot, routes, host, device, _NOTHING)
        if copies is not None:
            copies.synchronize()

    def begin(self, slot: memoryview) -> PendingCopy | None:
        """Write what may change at any time, and copy beside training what only an optimizer's step changes.

        Returns None when the image is complete: nothing can wait, or no optimizer's step has been seen since the last
        image, so that none may be seen before the next one. Otherwise no optimizer may step before `finish` of what is
        returned, and `slot` has to stay mapped until then. Raises as `write` does.
        """
        routes, watch = self._routes(), None
        if self._means.hook.step_seen() and (routes.device_later.sizes or routes.later.sizes):
            watch = self._watch()
        if watch is None:
            self.write(slot)
            return None
        # Training may have changed buffers, and on a device parameters too, when the witness is asked for.
        self._witness = Witness(self._step, self._table, self._placement.groups)
        copies = self._write_now(slot, routes, routes.now, routes.device_now, routes.device_later)
        indexes = {*routes.later.indexes, *routes.device_later.indexes}
        copied = [self._table.tensors[index] for index in indexes]
        copy = None
        if routes.later.sizes:
            anchor = ctypes.c_char.from_buffer(slot)
            addresses = _addresses(routes.later, ctypes.addressof(anchor), self._table.pointers)
            copy = self._means.thread.begin(partial(_copy_kept, (anchor, watch), *addresses, routes.later.sizes))
        pending = PendingCopy(watch, copied, copy, copies)
        self._means.hook.follow(pending)
        return pending

    def witness(self) -> dict[str, str]:
        """Return digests of a few replicated tensors, chosen by the step alone; empty when nothing is shared out."""
        if not self._placement.groups:
            return {}
        if self._witness is None:
            self._witness = Witness(self._step, self._table, self._placement.groups)
        return self._witness.digests()

    def _routes(self) -> Routes:
        return self._means.layouts.routes(self._placement, self._table, self._roles)

    def _watch(self) -> Watch | None:
        """Return the proof that what may wait does not change, or None when there can be none."""
        table, stepped = self._table, self._roles.stepped
        names, owners = list(compress(table.names, stepped)), list(compress(table.owners, stepped))
        try:
            return Watch(names, owners, list(compress(table.tensors, stepped)) if table.dtensors else owners)
        except RuntimeError:
            return None  # A tensor that was made in inference mode has no version.

    def _write_now(
        self, slot: memoryview, routes: Routes, host: Columns, device_now: Columns, device_later: Columns
    ) -> DeviceCopies | None:
        """Write everything but what is copied in the background, and begin what devices copy."""
        # Addresses are not checked by anybody later.
        fits = slot.nbytes >= self.image_bytes and slot.contiguous and not slot.readonly
        invariant(fits, f"a slot of {slot.nbytes} bytes can't take an image of {self.image_bytes}")
        table, layout = self._table, self._placement.layout
        pointers = table.current_pointers()
        with slot.cast("B") as target:
            target[: len(layout.header)] = layout.header
            anchor = ctypes.c_char.from_buffer(target)
            try:
                copy_bytes(*_addresses(host, ctypes.addressof(anchor), pointers), host.sizes)
            finally:
                del anchor  # It holds the slot's memory; a traceback must not.
            if routes.converted:
                self._convert(target, routes.converted)
            write_values(target, layout.values, self._values)
        if not (device_now.sizes or device_later.sizes):
            return None
        self._means.locks.lock(slot)
        # Last, because whoever fails would have to wait for them.
        return DeviceCopies(slot, table.tensors, device_now, device_later)

    def _convert(self, target: memoryview, converted: Sequence[Placed]) -> None:
        table = self._table
        elements = torch.frombuffer(target, dtype=torch.uint8)
        with torch.no_grad():
            for (_, index, begin, shape, _), offset, size in converted:
                place = elements[offset : offset + size].view(DTYPES[table.dtypes[index]])
                # From a CUDA tensor this waits until the elements have arrived.
                place.view(shape).copy_(narrowed(table.tensors[index], begin, shape))


_NOTHING = Columns([], [], [], [])


def _copy_kept(
    keeps: object,  # noqa: ARG001 - both sides of the copy, whatever becomes of whoever began it
    destinations: Sequence[int],
    sources: Sequence[int],
    sizes: Sequence[int],
) -> None:
    copy_bytes(destinations, sources, sizes)


def _addresses(columns: Columns, base: int, pointers: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return where copies go to and come from."""
    return (
        [base + offset for offset in columns.offsets],
        list(map(add, map(pointers.__getitem__, columns.indexes), columns.skips)),
    )
