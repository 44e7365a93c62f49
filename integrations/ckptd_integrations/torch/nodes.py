"""Decoded trees: what a restore reads, checked for form before anything is done with it."""

from __future__ import annotations

import importlib
import io
import json
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch

from ckptd.errors import DamagedError, StateError
from ckptd_integrations.torch.tensors import View
from ckptd_integrations.torch.tree import FACTORIES
from ckptd_integrations.torch.values import TREE_VERSION

MAPPINGS: Mapping[str, type] = {kind.__name__: kind for kind in (dict, OrderedDict, Counter, defaultdict)}
SEQUENCES: Mapping[str, type] = {kind.__name__: kind for kind in (list, tuple, deque)}
_SETS: Mapping[str, type] = {"set": set, "frozenset": frozenset}


class ValueNode(NamedTuple):
    """A value that holds no tensor; made once, used once."""

    value: Any


class TensorNode(NamedTuple):
    """A tensor, or a NumPy array that was captured as one."""

    name: str
    is_array: bool


class MappingNode(NamedTuple):
    """A dict or one of its standard subclasses."""

    kind: str
    items: list[tuple[Any, Node]]
    factory: Callable[[], Any] | None = None
    attributes: MappingNode | None = None

    def find(self, key: str) -> Node | None:
        """Return what the mapping has under `key`."""
        return next((item for name, item in self.items if name == key), None)


class SequenceNode(NamedTuple):
    """A list, tuple or deque."""

    kind: str
    items: list[Node]
    maxlen: int | None = None


class ObjectNode(NamedTuple):
    """An object with a state of its own."""

    kind: str
    class_name: str
    content: Node
    shapes: list[list[tuple[int, ...]]] | None
    """Of an optimizer: the shapes of its parameters, by group."""


Node = ValueNode | TensorNode | MappingNode | SequenceNode | ObjectNode


class Document(NamedTuple):
    """A whole values blob: nodes by name, and what the header can't say about tensors."""

    entries: dict[str, Node]
    aliases: dict[str, str]
    views: dict[str, View]


def read_document(blob: bytes) -> Document:
    """Decode a values blob; raises `DamagedError` when it is none, `StateError` when a newer ckptd wrote it."""
    try:
        # An import writes the text itself, since it may have to do without torch.
        is_text = blob.startswith(b"{")
        outer = json.loads(blob) if is_text else torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
        version, tree = outer["version"], outer if is_text else outer["tree"]
    except (UnpicklingError, RuntimeError, KeyError, TypeError, ValueError, EOFError) as error:
        raise DamagedError("the values of a shard can't be read") from error
    if version != TREE_VERSION:
        raise StateError(
            f"the values of a shard have format {version!r}; this ckptd reads {TREE_VERSION}",
            hint="restore with the version of ckptd that wrote the checkpoint, or a later one",
        )
    try:
        document = tree if is_text else json.loads(tree)
        return Document(
            {name: _decode(node) for name, node in document["entries"]},
            {str(name): str(first) for name, first in document["aliases"].items()},
            {str(name): _view(view) for name, view in document["views"].items()},
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise DamagedError("the tree of a shard's values can't be read") from error


def _view(view: list[Any]) -> View:
    dtype, strides, device = view
    return View(dtype, None if strides is None else tuple(strides), device)


def _decode(node: Any) -> Node:
    if not isinstance(node, list):
        return ValueNode(node)
    return _DECODERS[node[0]](*node)


def _value(node: Any) -> Any:
    return plain(_decode(node))


def plain(node: Node) -> Any:
    """Return the value of a node without tensors, mappings and objects; raises `TypeError` for any other."""
    if isinstance(node, ValueNode):
        return node.value
    if isinstance(node, SequenceNode):
        return SEQUENCES[node.kind](plain(item) for item in node.items)
    raise TypeError(f"{type(node).__name__} where a value is needed")


def _pairs(flat: list[Any]) -> list[tuple[Any, Node]]:
    keys = [_value(key) if isinstance(key, list) else key for key in flat[::2]]
    return list(zip(keys, map(_decode, flat[1::2]), strict=True))


def _flat(_: str, kind: str, prefix: str, keys: str) -> Node:
    return MappingNode(
        MAPPINGS[kind].__name__, [(key, TensorNode(f"{prefix}.{key}", False)) for key in keys.split("\n")]
    )


def _attributed(_: str, node: Any, attributes: Any) -> Node:
    inner, outer = _decode(node), _decode(attributes)
    if not (isinstance(inner, MappingNode) and isinstance(outer, MappingNode)):
        raise TypeError("attributes of what is no mapping")
    return MappingNode(inner.kind, inner.items, inner.factory, outer)


def _array(_: str, kind: str, code: str, data: str) -> Node:
    values = array(code, data.encode("latin-1"))
    return ValueNode(values.tolist() if kind == "list" else tuple(values))


def _scalar(_: str, dtype: str, data: str) -> Node:
    numpy: Any = importlib.import_module("numpy")
    return ValueNode(numpy.frombuffer(data.encode("latin-1"), dtype)[0])


def _dtype(_: str, name: str) -> Node:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return ValueNode(dtype)


def _object(_: str, kind: str, class_name: str, content: Any, shapes: Any) -> Node:
    groups = None if shapes is None else [[tuple(shape) for shape in group] for group in shapes]
    return ObjectNode(kind, class_name, _decode(content), groups)


_DECODERS: Mapping[str, Callable[..., Node]] = {
    "tensor": lambda _, name: TensorNode(str(name), is_array=False),
    "ndarray": lambda _, name: TensorNode(str(name), is_array=True),
    "flat": _flat,
    **dict.fromkeys(("dict", "OrderedDict", "Counter"), lambda kind, flat: MappingNode(kind, _pairs(flat))),
    "defaultdict": lambda kind, factory, flat: MappingNode(
        kind, _pairs(flat), None if factory is None else FACTORIES[factory]
    ),
    "attributed": _attributed,
    **dict.fromkeys(("list", "tuple"), lambda kind, items: SequenceNode(kind, [_decode(item) for item in items])),
    "deque": lambda kind, items, maxlen: SequenceNode(kind, [_decode(item) for item in items], maxlen),
    **dict.fromkeys(("set", "frozenset"), lambda kind, items: ValueNode(_SETS[kind](map(_value, items)))),
    "array": _array,
    "int": lambda _, digits: ValueNode(int(digits, 16)),
    "complex": lambda _, real, imag: ValueNode(complex(real, imag)),
    "bytes": lambda _, data: ValueNode(data.encode("latin-1")),
    "dtype": _dtype,
    "device": lambda _, name: ValueNode(torch.device(name)),
    "size": lambda _, sizes: ValueNode(torch.Size(sizes)),
    "scalar": _scalar,
    "object": _object,
}
