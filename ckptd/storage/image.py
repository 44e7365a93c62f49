"""The shard image: one safetensors file, byte for byte the same in a slot, on NVMe and in a bucket.

Layout, all offsets in bytes from the start of the file:

    0                8-byte little-endian length of the header
    8                JSON header, padded with spaces so that the data begins on a 4 KiB boundary
    data_begin       tensors, those with the widest elements first, so that each is aligned to its own element
    ...              `VALUES_NAME`: everything that is no tensor, as a length-prefixed blob in a U8 tensor whose
                     size is chosen so that the file ends on a 4 KiB boundary

Tensors cover the data without holes, which the safetensors format demands. The file's size is a multiple of 4 KiB,
so it can be written and read with O_DIRECT in whole blocks. Format: safetensors 0.x, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ckptd.errors import DamagedError, invariant
from ckptd.types import TensorSpan

BLOCK_BYTES = 4096
VALUES_NAME = "__ckptd__.values"
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Element sizes by safetensors dtype name."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What the layout needs to know of a tensor: its unique name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """The bytes of its elements."""
        return ITEM_BYTES[self.dtype] * prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in an image."""

    header: bytes
    """The first bytes of the file: length, JSON and padding."""
    spans: tuple[TensorSpan, ...]
    """All tensors in file order, the values blob last."""
    metadata: Mapping[str, str]
    image_bytes: int

    @property
    def values(self) -> TensorSpan:
        """The span of the values blob."""
        return self.spans[-1]


def round_up(size: int, block: int = BLOCK_BYTES) -> int:
    """Return the smallest multiple of `block` that is not below `size`."""
    return -(-size // block) * block


def plan(tensors: Sequence[TensorSpec], values_bytes: int, metadata: Mapping[str, str]) -> Layout:
    """Lay out an image of `tensors` with room for at least `values_bytes` of other state."""
    ordered = sorted(tensors, key=lambda spec: (-ITEM_BYTES[spec.dtype], spec.name))
    at = 0
    places: list[tuple[TensorSpec, int]] = []
    for spec in ordered:
        places.append((spec, at))
        at += spec.size_bytes
    capacity = round_up(at + _LENGTH.size + values_bytes) - at
    places.append((TensorSpec(VALUES_NAME, "U8", (capacity,)), at))
    at += capacity
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    for spec, begin in places:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.size_bytes],
        }
    invariant(len(entries) == len(places) + 1, "every tensor of an image has a name of its own")
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    data_begin = round_up(_LENGTH.size + len(body))
    header = _LENGTH.pack(data_begin - _LENGTH.size) + body.ljust(data_begin - _LENGTH.size)
    spans = tuple(
        TensorSpan(spec.name, spec.dtype, spec.shape, data_begin + begin, data_begin + begin + spec.size_bytes)
        for spec, begin in places
    )
    return Layout(header, spans, dict(metadata), data_begin + at)


def header_bytes(start: bytes | memoryview) -> int:
    """Return how many bytes the header takes, from the first 8 bytes of a file."""
    if len(start) < _LENGTH.size:
        raise DamagedError("a shard is shorter than its own header")
    (size,) = _LENGTH.unpack_from(start)
    if size > _MAX_HEADER_BYTES:
        raise DamagedError(f"a shard announces a header of {size} bytes")
    return int(_LENGTH.size + size)


def parse(image: memoryview) -> Layout:
    """Read the layout of an image; raises `DamagedError` when the header is not one of a complete image."""
    data_begin = header_bytes(image[: _LENGTH.size])
    if data_begin > len(image):
        raise DamagedError(f"a shard of {len(image)} bytes announces a header of {data_begin} bytes")
    return parse_header(bytes(image[:data_begin]), len(image))


def parse_header(header: bytes, file_bytes: int) -> Layout:
    """Read the layout from an image's first bytes, as many as `header_bytes` said, of a file of `file_bytes`."""
    data_begin = len(header)
    try:
        entries = json.loads(header[_LENGTH.size :])
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
        spans = sorted(
            (_span(name, entry, data_begin) for name, entry in entries.items()), key=lambda span: (span.begin, span.end)
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise DamagedError("a shard's header can't be read") from error
    _check(spans, data_begin, file_bytes)
    return Layout(header, tuple(spans), metadata, spans[-1].end)


def _span(name: str, entry: Mapping[str, Any], data_begin: int) -> TensorSpan:
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("whole numbers")
    return TensorSpan(name, str(entry["dtype"]), tuple(shape), data_begin + begin, data_begin + end)


def _check(spans: Sequence[TensorSpan], data_begin: int, available_bytes: int) -> None:
    if not spans or spans[-1].name != VALUES_NAME or spans[-1].end - spans[-1].begin < _LENGTH.size:
        raise DamagedError("a shard's header names no values: it was not written by ckptd, or not completely")
    at = data_begin
    for span in spans:
        if span.dtype not in ITEM_BYTES:
            raise DamagedError(f"tensor {span.name!r} is of the unknown dtype {span.dtype!r}")
        size = ITEM_BYTES[span.dtype] * prod(span.shape)
        if span.begin != at or span.end - span.begin != size:
            raise DamagedError(f"tensor {span.name!r} does not lie where a shard's header says")
        at = span.end
    if at > available_bytes:
        raise DamagedError(f"a shard has {available_bytes} bytes where its header needs {at}")


def write_values(slot: memoryview, span: TensorSpan, blob: bytes) -> None:
    """Write the values blob into its place, length first, zeros behind it."""
    begin = span.begin + _LENGTH.size
    _LENGTH.pack_into(slot, span.begin, len(blob))
    slot[begin : begin + len(blob)] = blob
    rest = span.end - begin - len(blob)
    slot[span.end - rest : span.end] = bytes(rest)


def read_values(image: memoryview, span: TensorSpan) -> bytes:
    """Return the values blob; raises `DamagedError` when its length can't be right."""
    (size,) = _LENGTH.unpack_from(image, span.begin)
    begin = span.begin + _LENGTH.size
    if size > span.end - begin:
        raise DamagedError("a shard's values are longer than their place")
    return bytes(image[begin : begin + size])
