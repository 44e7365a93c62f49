"""The witness: digests of a few replicated tensors, by which ranks prove to each other that they hold the same.

What is captured once would restore wrong ranks if it was not the same on all of them. To compare everything would cost
what sharing saves; each capture compares another 4 MiB.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from ckptd.storage.digest import digest
from ckptd.storage.image import ITEM_BYTES
from ckptd_integrations.torch.arrangement import Alike, row_major_offset
from ckptd_integrations.torch.sharing import split_dim, window
from ckptd_integrations.torch.tensors import TensorTable

WINDOW_BYTES = 4 * 1024 * 1024


class Witness:
    """What one capture looks at: in each group of sharers a window, which depends on the step alone."""

    def __init__(self, step: int, table: TensorTable, groups: Sequence[Sequence[Alike]]) -> None:
        """Choose the window; bytes on devices are fetched in the order of the devices' present work."""
        self._digests: dict[str, str] = {}
        self._fetched: list[tuple[str, Tensor]] = []
        for group in groups:
            boxes = sorted(group, key=lambda box: (box.label, str(box.offset)))
            sizes = [prod(box.shape) * ITEM_BYTES[table.dtypes[box.number]] for box in boxes]
            ends = list(accumulate(sizes))
            first, last = window(step, ends[-1] if ends else 0, WINDOW_BYTES // len(groups))
            for box, size, end in zip(boxes, sizes, ends, strict=True):
                begin, stop = max(first - (end - size), 0), min(last - (end - size), size)
                if begin < stop:
                    part = "" if box.shape == box.whole else "@" + ",".join(map(str, box.offset))
                    self._look(f"{box.label}{part}[{begin}:{stop}]", table, box, begin, stop)

    def digests(self) -> dict[str, str]:
        """Return digests by name and range of bytes; what devices fetch has to be here by now."""
        for name, elements in self._fetched:
            self._digests[name] = digest(elements.numpy().data)
        self._fetched = []
        return self._digests

    def _look(self, name: str, table: TensorTable, box: Alike, begin: int, stop: int) -> None:
        """Digest some bytes of a box, in the order in which an image has them, or have them fetched."""
        tensor = table.tensors[box.number]
        skip = row_major_offset(tuple(tensor.shape), box.begin, box.shape)
        if box.number not in table.odd and skip is not None:
            address = tensor.data_ptr() + skip * tensor.itemsize + begin
            self._digests[name] = digest(memoryview((ctypes.c_char * (stop - begin)).from_address(address)).cast("B"))
            return
        with torch.no_grad():
            rows, skipped_bytes = _rows(narrowed(tensor, box.begin, box.shape), begin, stop)
            whole = rows.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
            elements = whole[begin - skipped_bytes : stop - skipped_bytes]
            on_device = tensor.is_cuda
            place = torch.empty(elements.shape, dtype=torch.uint8, pin_memory=on_device)
            self._fetched.append((name, place.copy_(elements, non_blocking=on_device)))


def _rows(box: Tensor, begin: int, stop: int) -> tuple[Tensor, int]:
    """Return the rows that some bytes of a box lie in, and how many bytes come before them."""
    dim = split_dim(box.shape)
    if dim is None:
        return box, 0
    row_bytes = box.nbytes // box.shape[dim]
    first = begin // row_bytes
    return box.narrow(dim, first, -(-stop // row_bytes) - first), first * row_bytes


def narrowed(tensor: Tensor, begin: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return a view of a box of `tensor`."""
    for dim, (first, size) in enumerate(zip(begin, shape, strict=True)):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, first, size)
    return tensor
