"""The tree: everything of a state that is no tensor, and where its tensors belong.

A node is either a leaf (None, bool, float, str, or an int of 64 bits), or a tuple that begins with a tag, so nothing
of the user's can be taken for a reference. A tensor is referred to by its name in the image. Nodes hold nothing but
leaves and tuples: as text they are loaded by a parser that can't run code, and come back with the types they had.

    ("tensor", name)                            ("ndarray", name)
    ("flat", kind, prefix, keys)                a dict of tensors only, named prefix.key; keys joined by newlines
    ("dict" | "OrderedDict" | "Counter", (key, value, key, value, ...))
    ("defaultdict", factory, (key, value, ...))
    ("attributed", node, node)                  an OrderedDict with attributes: a module's state has `_metadata`
    ("list" | "tuple", (item, ...))             ("deque", (item, ...), maxlen)
    ("set" | "frozenset", (item, ...))
    ("array", "list" | "tuple", code, data)     many ints or floats, packed
    ("int", hex)  ("complex", real, imag)  ("bytes", data)  ("dtype", name)  ("device", name)  ("size", (size, ...))
    ("scalar", dtype, data)                     a NumPy scalar
    ("object", kind, class, node, shapes)       what `state_dict()` of an object returned; of kind "any" it was imported
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from types import NoneType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ckptd.errors import StateError
from ckptd_integrations.torch import objects
from ckptd_integrations.torch.tensors import PLAIN_TYPES, refuse, unsupported_kind
from ckptd_integrations.torch.values import initial_names, unique

MAX_DEPTH = 100
"""Containers nested deeper than this are refused; one that contains itself is the usual reason."""
NESTED_ITEMS = 16
"""A dict of at least so many dicts of tensors is compared with what it was at the last capture."""
PACKED_ITEMS = 64
"""A list of at least so many ints or floats is packed."""
FACTORIES: Mapping[str, Callable[[], Any]] = {
    kind.__name__: kind for kind in (bool, bytes, complex, dict, float, int, list, set, str, tuple)
}
"""What a defaultdict may be made with and still be the same after a restore."""
_LEAVES = frozenset({NoneType, bool, float, str})
_INT_LIMIT = 1 << 63


class Holds(Enum):
    """What may occur at a place of the state."""

    OBJECTS = "objects"
    """The user's own containers: also objects that have a state of their own."""
    TENSORS = "tensors"
    """What a `state_dict()` returned: no objects, since a restore would have nothing to load them into."""
    VALUES = "values"
    """Keys and members of sets: they are compared by value, which tensors are not."""


class Stepping(NamedTuple):
    """An optimizer that was met, and which of the tensors gathered are in its `state_dict()`."""

    optimizer: Any
    begin: int
    end: int


class Nested(NamedTuple):
    """A dict of dicts of tensors as it was met last: what its node was made of, the node, and the tensors' names."""

    form: tuple[list[Any], ...]
    node: Any
    names: list[str]


@dataclass(frozen=True, slots=True)
class Known:
    """What goes from one capture to the next and spares those after the first some work, by path."""

    nested: dict[str, Nested] = field(default_factory=dict)
    shapes: dict[str, objects.Shapes] = field(default_factory=dict)
    """Of optimizers' parameters."""


class Harvest:
    """Collects one capture: turns objects into nodes and gathers the tensors they refer to, under unique names."""

    def __init__(self, known: Known | None = None) -> None:
        """Begin a capture that makes use of what is `known`, and adds to it."""
        self._known = Known() if known is None else known
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        self.optimizers: list[Stepping] = []
        self._used = initial_names()

    def encode(self, value: Any, path: str, holds: Holds = Holds.OBJECTS, depth: int = 0) -> Any:
        """Return the node of `value`, which lies at `path`; raises `StateError` naming what can't be captured."""
        kind = type(value)
        if kind in _LEAVES:
            return value
        if kind is int:
            return value if -_INT_LIMIT <= value < _INT_LIMIT else ("int", hex(value))
        if depth > MAX_DEPTH:
            raise StateError(
                f"state {path[:80] + '…'!r} is nested deeper than {MAX_DEPTH} levels",
                hint="a container that contains itself can't be captured",
            )
        simple = _SIMPLE.get(kind)
        if simple is not None:
            return simple(value)
        if kind in PLAIN_TYPES:
            return self._tensor(value, path, holds)
        if kind in (dict, OrderedDict, Counter, defaultdict):
            return self._attributed(value, path, holds, depth)
        if kind in (list, tuple, deque):
            return self._sequence(value, path, holds, depth)
        if kind in (set, frozenset):
            return (kind.__name__, tuple(self.encode(item, path, Holds.VALUES, depth + 1) for item in value))
        return self._other(value, path, holds, depth)

    def mapping(self, value: Mapping[Any, Any], path: str, holds: Holds, depth: int) -> Any:
        """Return the node of a dict or one of its standard subclasses, without its attributes."""
        kind = type(value)
        if value and holds is not Holds.VALUES and kind in (dict, OrderedDict):
            flat = self._flat(value, path)
            if flat is not None:
                return flat
        if holds is Holds.VALUES:
            _refuse_value(path, "a dict")
        if len(value) >= NESTED_ITEMS and set(map(type, value.values())) == {dict} and kind is dict:
            return self._nested(value, path, holds, depth)
        return self._items(value, path, holds, depth)

    def _nested(self, value: Mapping[Any, Any], path: str, holds: Holds, depth: int) -> Any:
        # An optimizer's state of many parameters. Made anew, it would take as long as copying small tensors does.
        inner = list(value.values())
        keys = list(chain.from_iterable(inner))
        form = (list(map(type, value)), list(value), list(map(len, inner)), keys)
        tensors = list(chain.from_iterable(map(dict.values, inner)))
        is_flat = PLAIN_TYPES.issuperset(map(type, tensors)) and set(map(type, keys)) == {str}
        known = self._known.nested.get(path)
        if is_flat and known is not None and known.form == form and self._used.isdisjoint(known.names):
            self._used.update(known.names)
            self.names += known.names
            self.tensors += tensors
            return known.node
        begin = len(self.names)
        node = self._items(value, path, holds, depth)
        if is_flat and all(item[0] == "flat" for item in node[1][1::2]):
            self._known.nested[path] = Nested(form, node, self.names[begin:])
        return node

    def _items(self, value: Mapping[Any, Any], path: str, holds: Holds, depth: int) -> Any:
        kind = type(value)
        items = []
        for key, item in value.items():
            items.append(self.encode(key, path, Holds.VALUES, depth + 1))
            items.append(self.encode(item, f"{path}.{key}", holds, depth + 1))
        if kind is not defaultdict:
            return (kind.__name__, tuple(items))
        factory = value.default_factory  # type: ignore[attr-defined]
        name = None if factory is None else getattr(factory, "__name__", "")
        if name is not None and FACTORIES.get(name) is not factory:
            raise StateError(
                f"state {path!r} holds a defaultdict made with {factory!r}, which can't be captured",
                hint="use a plain dict, or one of " + ", ".join(FACTORIES),
            )
        return (kind.__name__, name, tuple(items))

    def _flat(self, value: Mapping[Any, Any], path: str) -> Any:
        # The usual case, a module's parameters or an optimizer's state of one of them, without a loop in Python.
        if not (set(map(type, value)) == {str} and PLAIN_TYPES.issuperset(map(type, value.values()))):
            return None
        keys = "\n".join(value)
        if not (path.isprintable() and keys.replace("\n", "").isprintable() and keys.count("\n") == len(value) - 1):
            return None
        names = [f"{path}.{key}" for key in value]
        if not self._used.isdisjoint(names):
            return None
        self._used.update(names)
        self.names += names
        self.tensors += value.values()
        return ("flat", type(value).__name__, path, keys)

    def _attributed(self, value: Mapping[Any, Any], path: str, holds: Holds, depth: int) -> Any:
        node = self.mapping(value, path, holds, depth)
        attributes = getattr(value, "__dict__", None)
        if not attributes:
            return node
        return ("attributed", node, self.mapping(attributes, path, holds, depth + 1))

    def _sequence(self, value: Any, path: str, holds: Holds, depth: int) -> Any:
        kind = type(value)
        if holds is Holds.VALUES and kind is not tuple:
            _refuse_value(path, f"a {kind.__name__}")
        if len(value) >= PACKED_ITEMS and kind is not deque:
            packed = _pack(value)
            if packed is not None:
                return ("array", kind.__name__, *packed)
        items = tuple(
            item
            if type(item) in _LEAVES
            else self.encode(item, path if holds is Holds.VALUES else f"{path}.{index}", holds, depth + 1)
            for index, item in enumerate(value)
        )
        return (kind.__name__, items, value.maxlen) if kind is deque else (kind.__name__, items)

    def _tensor(self, value: Tensor, path: str, holds: Holds, tag: str = "tensor") -> Any:
        if holds is Holds.VALUES:
            _refuse_value(path, "a tensor")
        name = unique(path, self._used)
        self.names.append(name)
        self.tensors.append(value)
        return (tag, name)

    def _other(self, value: Any, path: str, holds: Holds, depth: int) -> Any:
        if isinstance(value, Tensor):
            kind = unsupported_kind(value)
            if kind is not None:
                refuse(path, kind)
            return self._tensor(value, path, holds)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            if isinstance(value, numpy.ndarray):
                return self._tensor(_tensor_of_array(value, path), path, holds, "ndarray")
            if isinstance(value, numpy.generic) and value.dtype.kind in "biufc":
                return ("scalar", value.dtype.str, value.tobytes().decode("latin-1"))
        kind = objects.object_kind(value)
        if kind is None or holds is not Holds.OBJECTS:
            _refuse_type(value, path, has_state=kind not in (None, objects.GENERATOR))
        content, whole = objects.collect(value, kind)
        begin = len(self.tensors)
        if whole:
            node = self.encode(content, path, Holds.TENSORS, depth + 1)
        else:
            node = self.mapping(content, path, Holds.TENSORS, depth + 1)
        shapes = None
        if kind == objects.OPTIMIZER:
            self.optimizers.append(Stepping(value, begin, len(self.tensors)))
            shapes = self._known.shapes[path] = objects.parameter_shapes(value, self._known.shapes.get(path))
        return ("object", kind, objects.class_name(value, kind), node, shapes)


def _pack(value: Iterable[Any]) -> tuple[str, str] | None:
    kinds = set(map(type, value))
    if kinds not in ({int}, {float}):
        return None
    code = "q" if kinds == {int} else "d"
    try:
        return code, array(code, value).tobytes().decode("latin-1")
    except OverflowError:
        return None


def _tensor_of_array(value: Any, path: str) -> Tensor:
    numpy = sys.modules["numpy"]
    if type(value) not in (numpy.ndarray, numpy.memmap):
        _refuse_type(value, path, has_state=False)
    if not value.flags.writeable or any(stride < 0 for stride in value.strides):
        value = value.copy()  # torch has no read-only tensors and no negative strides.
    try:
        return torch.from_numpy(value)
    except (TypeError, ValueError):
        refuse(path, f"a NumPy array of dtype {value.dtype}")


def _refuse_value(path: str, what: str) -> NoReturn:
    raise StateError(
        f"state {path!r} holds {what} in a set or as a key, which can't be captured", hint="keep it in a list or a dict"
    )


def _refuse_type(value: Any, path: str, *, has_state: bool) -> NoReturn:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    base = next((base for base in _BASES if isinstance(value, base)), None)
    if has_state:
        hint = "put what its state_dict() returns there, or bind the object under a name of its own"
    elif callable(value):
        hint = "leave code out of the state"
    elif base is not None:
        hint = f"it would come back as a {base.__name__}: convert it with {base.__name__}(...)"
    else:
        hint = "give it state_dict and load_state_dict, or leave it out of the state"
    raise StateError(f"state {path!r} holds a {name}, which can't be captured", hint=hint)


_SIMPLE: Mapping[type, Callable[[Any], Any]] = {
    complex: lambda value: ("complex", value.real, value.imag),
    bytes: lambda value: ("bytes", value.decode("latin-1")),
    torch.dtype: lambda value: ("dtype", str(value).removeprefix("torch.")),
    torch.device: lambda value: ("device", str(value)),
    torch.Size: lambda value: ("size", tuple(value)),
}
_BASES = (dict, list, tuple, set, frozenset, str, bytes, int, float, complex)
