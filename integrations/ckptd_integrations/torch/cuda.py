"""Copying from CUDA devices: page-locked slots, a stream beside training's, and events instead of waits of the host.

A slot's memory is page-locked once, when the first image goes there: only then does a device write to it while the
host goes on. What only an optimizer's step changes is copied on a stream of ckptd's own, which waits for the work
that training has given the device so far; the optimizer's step waits for the copy on the device. What training may
change at any time is copied in the stream of training itself, before any later work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ckptd_integrations.torch.layouts import Columns

_cuda: Any = torch.cuda
_streams: dict[torch.device, Any] = {}
"""One stream of ckptd's own per device, made at its first capture."""


class PageLocks:
    """The slots whose memory is page-locked. Each is kept mapped until it is unlocked again."""

    def __init__(self) -> None:
        self._anchors: dict[tuple[int, int], Any] = {}
        self._refused: set[tuple[int, int]] = set()

    def lock(self, slot: memoryview) -> None:
        """Page-lock `slot` unless it is already, or can't be: then copies are right, and the host waits for them."""
        # Of a view of its own, so that the caller's can be released.
        anchor = ctypes.c_char.from_buffer(slot.cast("B"))
        place = (ctypes.addressof(anchor), slot.nbytes)
        if place in self._anchors or place in self._refused:
            return
        if int(_cuda.cudart().cudaHostRegister(*place, 0)) == 0:
            self._anchors[place] = anchor
        else:
            self._refused.add(place)

    def release(self, below_bytes: int | None = None) -> None:
        """Unlock all slots, or those of fewer than `below_bytes`: an image that large has made them useless."""
        for place in list(self._anchors):
            if below_bytes is None or place[1] < below_bytes:
                _cuda.cudart().cudaHostUnregister(place[0])
                del self._anchors[place]  # Now the client may unmap it.
        if below_bytes is None:
            self._refused.clear()


class DeviceCopies:
    """Copies that devices make. They refer to the slot until `synchronize`."""

    def __init__(self, slot: memoryview, tensors: Sequence[Tensor], now: Columns, later: Columns) -> None:
        """Give all copies to the devices: `now` in the order of their present work, `later` beside it."""
        elements = torch.frombuffer(slot, dtype=torch.uint8)
        self._slot: Tensor | None = elements
        self._events: list[tuple[torch.device, Any]] = []
        with torch.no_grad():
            for device in {tensors[index].device for index in (*now.indexes, *later.indexes)}:
                present = _cuda.current_stream(device)
                if device not in _streams:
                    _streams[device] = _cuda.Stream(device)
                beside = _streams[device]
                beside.wait_stream(present)
                for stream, columns in ((present, now), (beside, later)):
                    with _cuda.stream(stream):
                        _copy(
                            elements,
                            [tensor if tensor.device == device else None for tensor in tensors],
                            columns,
                            stream,
                        )
                        self._events.append((device, stream.record_event()))

    @property
    def done(self) -> bool:
        """Whether all bytes are there."""
        return all(event.query() for _, event in self._events)

    def order(self) -> None:
        """Have what each device is given from now on wait for the copies."""
        for device, event in self._events:
            _cuda.current_stream(device).wait_event(event)

    def synchronize(self) -> None:
        """Wait until all bytes are there, and let go of the slot."""
        for _, event in self._events:
            event.synchronize()
        self._slot = None


class DeviceNumber:
    """One number on its way from a device to page-locked memory."""

    def __init__(self, tensor: Tensor) -> None:
        """Give the copy to the device, behind its present work."""
        with torch.no_grad():
            self._host = torch.empty((), dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor.detach().reshape(()), non_blocking=True)
            self._event = _cuda.current_stream(tensor.device).record_event()

    @property
    def done(self) -> bool:
        """Whether it is there."""
        return bool(self._event.query())

    def value(self) -> float:
        """Wait for it, and return it."""
        self._event.synchronize()
        return float(self._host)


def _copy(elements: Tensor, tensors: Sequence[Tensor | None], columns: Columns, stream: Any) -> None:
    """Give the copies of those `tensors` that are there to the present stream, which is `stream`."""
    for index, skip, offset, size in zip(*columns, strict=True):
        tensor = tensors[index]
        if tensor is not None:
            source = tensor.detach().reshape(-1).view(torch.uint8)[skip : skip + size]
            elements[offset : offset + size].copy_(source, non_blocking=True)
            # Memory that is freed meanwhile must not be given out again before the copy.
            source.record_stream(stream)
