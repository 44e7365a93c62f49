"""The shard image: one safetensors file, byte for byte the same in a slot, on NVMe and in a bucket.

Layout, all offsets in bytes from the start of the file:

    0                8-byte little-endian length of the header
    8                JSON header, padded with spaces so that the data begins on a 4 KiB boundary
    data_begin       tensors, those with the widest elements first, so that each is aligned to its own element
    ...              `VALUES_NAME`: everything that is no tensor, as a length-prefixed blob in a U8 tensor whose
                     size is chosen so that the file ends on a 4 KiB boundary

An entry that is a part of a tensor of the whole job (a share of replicated state, a DTensor's local part) is listed in
the header's metadata under `PIECES_KEY`, as JSON: {entry: [tensor, global shape, offset]}.

Tensors cover the data without holes, which the safetensors format demands. The file's size is a multiple of 4 KiB,
so it can be written and read with O_DIRECT in whole blocks. Format: safetensors 0.x, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from ckptd.errors import DamagedError, invariant
from ckptd.types import Piece, TensorSpan

BLOCK_BYTES = 4096
VALUES_NAME = "__ckptd__.values"
PIECES_KEY = "ckptd.pieces"
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Element sizes by safetensors dtype name."""


class TensorSpec(NamedTuple):
    """What the layout needs to know of an entry: its unique name, safetensors dtype, shape and whose part it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    piece: Piece | None = None

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
    metadata = dict(metadata)
    entries: dict[str, object] = {"__metadata__": metadata}
    pieces: dict[str, Piece] = {}
    places: list[tuple[TensorSpec, int, int]] = []
    at = 0
    for spec in sorted(tensors, key=lambda spec: (-ITEM_BYTES[spec.dtype], spec.name)):
        name, dtype, shape, piece = spec
        end = at + ITEM_BYTES[dtype] * prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (at, end)}
        places.append((spec, at, end))
        if piece is not None:
            pieces[name] = piece
        at = end
    end = round_up(at + _LENGTH.size + values_bytes)
    values = TensorSpec(VALUES_NAME, "U8", (end - at,))
    entries[VALUES_NAME] = {"dtype": values.dtype, "shape": values.shape, "data_offsets": (at, end)}
    places.append((values, at, end))
    invariant(len(entries) == len(places) + 1, "every tensor of an image has a name of its own")
    if pieces:
        metadata[PIECES_KEY] = json.dumps(pieces, separators=(",", ":"), ensure_ascii=False)
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    data_begin = round_up(_LENGTH.size + len(body))
    header = _LENGTH.pack(data_begin - _LENGTH.size) + body.ljust(data_begin - _LENGTH.size)
    spans = tuple(
        TensorSpan(name, dtype, shape, data_begin + begin, data_begin + end, piece)
        for (name, dtype, shape, piece), begin, end in places
    )
    return Layout(header, spans, metadata, data_begin + end)


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
    try:
        entries = json.loads(header[_LENGTH.size :])
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
        pieces = json.loads(metadata.get(PIECES_KEY, "{}"))
        in_order = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        spans = _spans(in_order, pieces, len(header))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise DamagedError("a shard's header can't be read") from error
    if not spans or spans[-1].name != VALUES_NAME or spans[-1].end - spans[-1].begin < _LENGTH.size:
        raise DamagedError("a shard's header names no values: it was not written by ckptd, or not completely")
    if spans[-1].end > file_bytes:
        raise DamagedError(f"a shard has {file_bytes} bytes where its header needs {spans[-1].end}")
    return Layout(header, spans, metadata, spans[-1].end)


def _spans(entries: Sequence[tuple[str, Any]], pieces: Mapping[str, Any], data_begin: int) -> tuple[TensorSpan, ...]:
    spans = []
    at = 0
    for name, entry in entries:
        dtype, shape = entry["dtype"], whole_numbers(entry["shape"])
        begin, end = entry["data_offsets"]
        if dtype not in ITEM_BYTES:
            raise DamagedError(f"tensor {name!r} is of the unknown dtype {dtype!r}")
        size = ITEM_BYTES[dtype] * prod(shape)
        if begin != at or end != at + size:
            raise DamagedError(f"tensor {name!r} does not lie where a shard's header says")
        piece = pieces.get(name)
        begin = data_begin + at
        spans.append(
            TensorSpan(name, dtype, shape, begin, begin + size, None if piece is None else _piece(piece, shape))
        )
        at += size
    return tuple(spans)


def whole_numbers(numbers: Any) -> tuple[int, ...]:
    """Return a JSON list as a tuple; raises `ValueError` unless it is a list of whole numbers that are not negative."""
    if type(numbers) is not list:
        raise ValueError("no list of whole numbers")
    for number in numbers:
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r} is no whole number")
    return tuple(numbers)


def _piece(piece: Any, shape: tuple[int, ...]) -> Piece:
    tensor, whole, offset = piece
    read = Piece(str(tensor), whole_numbers(whole), whole_numbers(offset))
    if not is_inside(read.offset, shape, read.shape):
        raise ValueError("a part beyond its tensor")
    return read


def is_inside(offset: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether a box of `shape` at `offset` lies in a tensor of the shape `whole`."""
    if not len(offset) == len(shape) == len(whole):
        return False
    for begin, size, limit in zip(offset, shape, whole, strict=True):  # noqa: SIM110 - three times as fast as all()
        if begin + size > limit:
            return False
    return True


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
