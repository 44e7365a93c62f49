"""The shard image: laid out without holes, readable with the standard library for it, and refused when damaged."""

from __future__ import annotations

import json
import struct
import warnings
from pathlib import Path

import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from ckptd.errors import DamagedError
from ckptd.storage import image
from ckptd.storage.image import BLOCK_BYTES, ITEM_BYTES, PIECES_KEY, VALUES_NAME, Layout, TensorSpec
from ckptd.types import Piece

_NAMES = st.text(st.characters(codec="utf-8"), max_size=20).filter(
    lambda name: name not in (VALUES_NAME, "__metadata__")
)
_SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@st.composite
def _spec(draw: st.DrawFn) -> TensorSpec:
    """A tensor of one rank, or a part of one of the job."""
    name, dtype, shape = draw(_NAMES), draw(st.sampled_from(sorted(ITEM_BYTES))), draw(_SHAPES)
    if not draw(st.booleans()):
        return TensorSpec(name, dtype, shape)
    offset = tuple(draw(st.integers(0, 9)) for _ in shape)
    whole = tuple(begin + size + draw(st.integers(0, 9)) for begin, size in zip(offset, shape, strict=True))
    return TensorSpec(name, dtype, shape, Piece(draw(_NAMES), whole, offset))


_SPECS = st.lists(_spec(), max_size=12, unique_by=lambda spec: spec.name)
_METADATA = st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=4)
_TORCH = {
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64, "C64": torch.complex64,
    "F32": torch.float32, "I32": torch.int32, "U32": torch.uint32,
    "F16": torch.float16, "BF16": torch.bfloat16, "I16": torch.int16, "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def fill(layout: Layout, blob: bytes = b"") -> memoryview:
    """A complete image with a pattern in every tensor."""
    data = memoryview(bytearray(layout.image_bytes))
    data[: len(layout.header)] = layout.header
    for number, span in enumerate(layout.spans[:-1]):
        pattern = bytes((number + at) % 2 if span.dtype == "BOOL" else (number * 7 + at) % 251 for at in range(64))
        size = span.end - span.begin
        data[span.begin : span.end] = (pattern * (size // 64 + 1))[:size]
    image.write_values(data, layout.values, blob)
    return data


def sample() -> bytes:
    """A small image of two tensors."""
    specs = [TensorSpec("weight", "F32", (2, 3)), TensorSpec("mask", "BOOL", (5,))]
    return bytes(fill(image.plan(specs, 3, {"step": "7"}), b"abc"))


def with_header(entries: object, *, size: int = 2 * BLOCK_BYTES) -> bytes:
    """A file with that JSON as its header, padded to a block."""
    text = entries if isinstance(entries, str) else json.dumps(entries)
    body = text.encode().ljust(BLOCK_BYTES - 8)
    return (struct.pack("<Q", len(body)) + body).ljust(size, b"\0")


# --- layout -----------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(_SPECS, st.integers(0, 3 * BLOCK_BYTES), _METADATA)
def test_layout_has_no_holes(specs: list[TensorSpec], values_bytes: int, metadata: dict[str, str]) -> None:
    """Tensors follow each other without a gap, each aligned to its element, from one block boundary to another."""
    layout = image.plan(specs, values_bytes, metadata)
    assert len(layout.header) % BLOCK_BYTES == 0
    assert layout.image_bytes % BLOCK_BYTES == 0
    at = len(layout.header)
    for span in layout.spans:
        assert span.begin == at
        assert (span.begin - len(layout.header)) % ITEM_BYTES[span.dtype] == 0
        at = span.end
    assert at == layout.image_bytes
    assert layout.values.name == VALUES_NAME
    assert layout.values.end - layout.values.begin >= 8 + values_bytes
    by_name = {span.name: span for span in layout.spans[:-1]}
    assert {name: (span.dtype, span.shape, span.end - span.begin) for name, span in by_name.items()} == {
        spec.name: (spec.dtype, spec.shape, spec.size_bytes) for spec in specs
    }


@settings(max_examples=80, deadline=None)
@given(_SPECS, st.integers(0, 5000), _METADATA)
@example([TensorSpec("a", "F32", (0,)), TensorSpec("b", "F32", (0, 3)), TensorSpec("c", "U8", ())], 0, {})
def test_an_image_describes_itself(specs: list[TensorSpec], values_bytes: int, metadata: dict[str, str]) -> None:
    """What was planned is read back equal from the image, even when the slot is larger than the image."""
    layout = image.plan(specs, values_bytes, metadata)
    slot = memoryview(bytes(fill(layout)) + b"left over from an older image" * 200)
    assert image.parse(slot) == layout
    assert image.parse(slot[: layout.image_bytes]) == layout


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=9000), st.integers(0, 5000))
def test_values_come_back(blob: bytes, room: int) -> None:
    """The values blob is read as it was written, whatever was in the slot before and however much room there is."""
    layout = image.plan([TensorSpec("x", "F16", (3,))], len(blob) + room, {})
    slot = memoryview(bytearray(b"\xff" * layout.image_bytes))
    image.write_values(slot, layout.values, blob)
    assert image.read_values(slot, layout.values) == blob
    span = layout.values
    assert not any(slot[span.begin + 8 + len(blob) : span.end]), "what is behind the blob is not the same every time"


# --- the standard library for the format ------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specs=_SPECS, metadata=_METADATA, blob=st.binary(max_size=100))
def test_safetensors_agrees(tmp_path: Path, specs: list[TensorSpec], metadata: dict[str, str], blob: bytes) -> None:
    """The `safetensors` library opens every image and sees the same names, dtypes, shapes, bytes and metadata."""
    layout = image.plan(specs, len(blob), metadata)
    data = fill(layout, blob)
    path = tmp_path / "rank-00000.safetensors"
    path.write_bytes(data)
    spans = {span.name: span for span in layout.spans}
    with safetensors.safe_open(path, "pt") as opened:
        found = opened.metadata() or {}
        pieces = json.loads(found.pop(PIECES_KEY, "{}"))
        assert found == metadata
        assert pieces == {spec.name: json.loads(json.dumps(spec.piece)) for spec in specs if spec.piece is not None}
        assert set(opened.keys()) == set(spans)
        for name, span in spans.items():
            part = opened.get_slice(name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (span.dtype, span.shape)
    loaded = safetensors.torch.load_file(path)
    for name, span in spans.items():
        tensor = loaded[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (_TORCH[span.dtype], span.shape)
        assert bytes(tensor.reshape(-1).view(torch.uint8).numpy()) == data[span.begin : span.end]


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_every_dtype_is_one_of_the_library(dtype: str) -> None:
    """For each dtype of ours, what torch writes through `safetensors` has our name and element size for it."""
    ours = fill(image.plan([TensorSpec("t", dtype, (3, 5))], 0, {}))
    span = image.parse(ours).spans[0]
    tensor = torch.frombuffer(bytearray(ours[span.begin : span.end]), dtype=_TORCH[dtype]).reshape(3, 5)
    theirs = safetensors.torch.save({"t": tensor})
    header = json.loads(theirs[8 : 8 + struct.unpack("<Q", theirs[:8])[0]])
    assert header["t"]["dtype"] == dtype
    assert header["t"]["data_offsets"] == [0, 15 * ITEM_BYTES[dtype]]
    assert theirs[-15 * ITEM_BYTES[dtype] :] == ours[span.begin : span.end]


def test_numpy_agrees(tmp_path: Path) -> None:
    """The NumPy door of the library reads an image too, for each dtype that NumPy has."""
    specs = [
        TensorSpec(f"t-{dtype}", dtype, (2, 3)) for dtype in ITEM_BYTES if dtype not in ("BF16", "F8_E4M3", "F8_E5M2")
    ]
    layout = image.plan(specs, 0, {})
    data = fill(layout)
    (tmp_path / "shard").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # patterns may be signalling NaNs
        loaded = safetensors.numpy.load_file(tmp_path / "shard")
    for span in layout.spans:
        assert loaded[span.name].tobytes() == bytes(data[span.begin : span.end])
        assert loaded[span.name].shape == span.shape


# --- damage -----------------------------------------------------------------------------------------------------


def _read_everything(data: bytes) -> None:
    layout = image.parse(memoryview(data))
    image.read_values(memoryview(data), layout.values)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_random_damage_raises_only_damaged_errors(data: st.DataObject) -> None:
    """Bytes of an image that are changed, cut or inserted at random lead to a `DamagedError` or to a sound layout."""
    good = sample()
    spoiled = bytearray(good)
    end = good.index(b"   ")  # the padding behind the JSON is of less interest
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, end))
        spoiled[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    if data.draw(st.booleans()):
        del spoiled[data.draw(st.integers(0, len(spoiled))) :]
    try:
        _read_everything(bytes(spoiled))
    except DamagedError:
        return
    layout = image.parse(memoryview(bytes(spoiled)))
    assert all(span.dtype in ITEM_BYTES and min(span.shape, default=0) >= 0 for span in layout.spans)
    assert layout.image_bytes <= len(spoiled)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(sorted(ITEM_BYTES)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(_JSON, st.dictionaries(st.sampled_from(["t", VALUES_NAME, "__metadata__"]), _JSON)))
@example({"t": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 4]}})
@example({VALUES_NAME: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})
@example({"__metadata__": [1]})
@example([])
def test_any_json_as_header_raises_only_damaged_errors(entries: object) -> None:
    """Whatever JSON stands in the place of a header, reading it raises a `DamagedError` or gives a sound layout."""
    data = with_header(entries)
    try:
        _read_everything(data)
    except DamagedError:
        return
    assert image.parse(memoryview(data)).values.name == VALUES_NAME


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_damaged(data: bytes) -> None:
    """Random bytes are no image."""
    assume(VALUES_NAME.encode() not in data)
    with pytest.raises(DamagedError):
        _read_everything(data)


_VALUES = {"dtype": "U8", "shape": [4096], "data_offsets": [16, 4112]}


@pytest.mark.parametrize(
    ("what", "tensor", "says"),
    [
        ("a gap", {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "does not lie where"),
        ("an overlap", {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}, "does not lie where"),
        ("a size that is not the shape's", {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}, "'t'"),
        ("a negative shape", {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}, "can't be read"),
        ("an unknown dtype", {"dtype": "F4", "shape": [4], "data_offsets": [0, 16]}, "'F4'"),
        ("an unknown dtype of no bytes", {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}, "'F4'"),
        ("an endless shape", {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 16]}, "can't be read"),
        ("a shape of text", {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}, "can't be read"),
        ("a shape of fractions", {"dtype": "F32", "shape": [4.5], "data_offsets": [0, 16]}, "can't be read"),
        ("no shape", {"dtype": "F32", "data_offsets": [0, 16]}, "can't be read"),
        ("one offset", {"dtype": "F32", "shape": [4], "data_offsets": [0]}, "can't be read"),
        ("no record", 7, "can't be read"),
    ],
)
def test_a_header_that_lies_is_refused(what: str, tensor: object, says: str) -> None:
    """A header with a gap, an overlap, an unknown dtype or an impossible shape is a `DamagedError` that says so."""
    with pytest.raises(DamagedError, match=says):
        _read_everything(with_header({"t": tensor, VALUES_NAME: _VALUES}, size=3 * BLOCK_BYTES))


@pytest.mark.parametrize(
    "pieces",
    ["{", "[]", "7", '{"t": 7}', '{"t": ["whole", [8]]}', '{"t": ["whole", [8], [5]]}', '{"t": ["whole", [8], [-1]]}',
     '{"t": ["whole", [8, 1], [0, 0]]}', '{"t": ["whole", [8.0], [0]]}', '{"t": ["whole", "8", "0"]}'],
)  # fmt: skip
def test_parts_that_can_not_be_are_refused(pieces: str) -> None:
    """Metadata that calls an entry a part of a tensor it can't be a part of is a `DamagedError`."""
    tensor = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    entries = {"__metadata__": {PIECES_KEY: pieces}, "t": tensor, VALUES_NAME: _VALUES}
    with pytest.raises(DamagedError, match="can't be read"):
        _read_everything(with_header(entries, size=3 * BLOCK_BYTES))


def test_a_file_without_values_is_not_ours() -> None:
    """A safetensors file that ckptd did not write is refused with words that say this."""
    foreign = safetensors.torch.save({"weight": torch.zeros(4)})
    with pytest.raises(DamagedError, match="not written by ckptd"):
        image.parse(memoryview(foreign))


@pytest.mark.parametrize("keep", [0, 7, 8, 100, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 24, 2 * BLOCK_BYTES - 1])
def test_an_image_cut_short_is_damaged(keep: int) -> None:
    """Wherever an image is cut off, it is refused."""
    with pytest.raises(DamagedError):
        _read_everything(sample()[:keep])


def test_a_huge_header_is_not_read() -> None:
    """A length that no library would accept is refused before anything of that size is read."""
    with pytest.raises(DamagedError, match="announces a header"):
        image.header_bytes(struct.pack("<Q", 2**62))


@pytest.mark.parametrize(
    "values",
    [{"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}],
)
def test_values_without_room_for_their_length_are_damaged(values: object) -> None:
    """A values blob that is too small to say how long it is leads to no read outside of it."""
    data = with_header({VALUES_NAME: values}, size=BLOCK_BYTES + values["shape"][0])  # type: ignore[index]
    with pytest.raises(DamagedError):
        _read_everything(data)


def test_values_that_claim_too_much_are_damaged() -> None:
    """A values blob that says it is longer than its place is refused."""
    layout = image.plan([], 10, {})
    data = fill(layout, b"abc")
    struct.pack_into("<Q", data, layout.values.begin, 2**40)
    with pytest.raises(DamagedError, match="longer than their place"):
        image.read_values(data, layout.values)
