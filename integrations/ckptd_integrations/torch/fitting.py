"""Fitting a decoded tree to the user's objects: first everything is checked, then everything is filled.

`Fitter.fit` raises while nothing has been changed, and returns a function that makes the change. Containers are filled
in place as deep as they match, so that references the user holds into them stay valid.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ckptd.errors import StateError
from ckptd_integrations.torch import loading
from ckptd_integrations.torch.forms import formed, is_any
from ckptd_integrations.torch.nodes import (
    MAPPINGS,
    SEQUENCES,
    MappingNode,
    Node,
    ObjectNode,
    SequenceNode,
    TensorNode,
    ValueNode,
)
from ckptd_integrations.torch.objects import GENERATOR, object_kind
from ckptd_integrations.torch.optimizers import ParameterState
from ckptd_integrations.torch.sources import CheckpointTensors
from ckptd_integrations.torch.values import ANY

Fill = Callable[[], Any]
_MISSING: Any = object()
_NOW = "in the bound state"


class Fitter:
    """Checks nodes against objects, and collects how to fill them.

    Without `generators`, bound random number generators keep their state: a rank that the captured run did not have
    has none to take over.
    """

    def __init__(self, tensors: CheckpointTensors, *, generators: bool = True) -> None:
        self._tensors = tensors
        self._generators = generators

    def fit_root(self, node: Node, current: Any, name: str) -> Fill:
        """Check the state of one name; the returned function fills it and returns what the name now stands for.

        Raises `StateError` when the object can't be filled in place and is one that the user may hold on to.
        """
        node = formed(node, current, name)
        fillable = isinstance(current, (Tensor, dict, list, set, deque)) or _is_array(current)
        if fillable and not _is_same_kind(node, current):
            raise _mismatch(node, current, name)
        return self.fit(node, current, name)

    def build(self, node: Node, path: str, like: Any = None) -> Fill:
        """Return a function that makes a new object of `node`, with tensors of its own.

        `like` is a container of the same form, as far as there is one: new tensors are made as those in it are.
        """
        if isinstance(node, ObjectNode) and node.kind == ANY:
            return self.build(node.content, path, like)
        if isinstance(node, TensorNode):
            tensor = self._make(node, path, like)
            return lambda: tensor.numpy() if node.is_array else tensor
        if isinstance(node, MappingNode):
            old = like if isinstance(like, Mapping) else {}
            fills = [(key, self.build(item, f"{path}.{key}", old.get(key))) for key, item in node.items]
            attributes = None if node.attributes is None else self.build(node.attributes, path)
            return lambda: _new_mapping(node, fills, attributes)
        if isinstance(node, SequenceNode):
            items = like if isinstance(like, Sequence) and len(like) == len(node.items) else [None] * len(node.items)
            made = [self.build(item, f"{path}.{index}", items[index]) for index, item in enumerate(node.items)]
            return lambda: _new_sequence(node, (fill() for fill in made))
        return self.fit(node, _MISSING, path)

    def _make(self, node: TensorNode, path: str, like: Any) -> Tensor:
        if isinstance(like, ParameterState):
            return like.make(self._tensors, node.name, path)
        return self._tensors.make(node.name, like if isinstance(like, Tensor) else None)

    def fit(self, node: Node, current: Any, path: str) -> Fill:
        """Check `node` against the object at `path`; the returned function fills or replaces it."""
        # Asking a tensor whether it is a generator takes longer than all else that is done with it.
        kind = None if current is _MISSING or isinstance(current, Tensor) else object_kind(current)
        if is_any(node):
            return (
                self.build(node, path) if current is _MISSING else self.fit(formed(node, current, path), current, path)
            )
        if isinstance(node, ObjectNode):
            if kind != node.kind:
                raise _mismatch(node, current, path)
            if kind == GENERATOR and not self._generators:
                return lambda: current
            return loading.fit_object(node, current, path, self._tensors, self.build)
        if kind is not None:
            raise _mismatch(node, current, path)
        if current is _MISSING and not isinstance(node, ValueNode):
            return self.build(node, path)
        if isinstance(node, TensorNode):
            return self._fit_tensor(node, current, path)
        if isinstance(node, MappingNode):
            return self._fit_mapping(node, current, path)
        if isinstance(node, SequenceNode):
            return self._fit_sequence(node, current, path)
        return _fit_value(node, current, path)

    def _fit_tensor(self, node: TensorNode, current: Any, path: str) -> Fill:
        if not _is_same_kind(node, current):
            return self.build(node, path)
        if node.is_array and not current.flags.writeable:
            raise StateError(
                f"array {path!r} is read-only and can't be filled", hint="bind a writable array, such as a copy of it"
            )
        target = torch.from_numpy(current) if node.is_array else current
        self._tensors.fill(node.name, target, path, _NOW)
        return lambda: current

    def _fit_mapping(self, node: MappingNode, current: Any, path: str) -> Fill:
        if not _is_same_kind(node, current):
            return self.build(node, path)
        old: MutableMapping[Any, Any] = current
        fills = [(key, self.fit(item, old.get(key, _MISSING), f"{path}.{key}")) for key, item in node.items]
        kept = {key for key, _ in node.items}
        _refuse_dropping((f"{path}.{key}", item) for key, item in old.items() if key not in kept)
        attributes = None if node.attributes is None else self.build(node.attributes, path)

        def fill() -> Any:
            items = [(key, fill_item()) for key, fill_item in fills]
            old.clear()
            for key, item in items:
                old[key] = item
            if attributes is not None:
                old.__dict__.update(attributes())
            return old

        return fill

    def _fit_sequence(self, node: SequenceNode, current: Any, path: str) -> Fill:
        if not _is_same_kind(node, current):
            return self.build(node, path)
        old = list(current)
        fills = [
            self.fit(item, old[index] if index < len(old) else _MISSING, f"{path}.{index}")
            for index, item in enumerate(node.items)
        ]
        _refuse_dropping((f"{path}.{index}", item) for index, item in enumerate(old) if index >= len(fills))

        def fill() -> Any:
            items = [fill_item() for fill_item in fills]
            if isinstance(current, tuple):
                # A tuple whose members were all filled in place is still the right one.
                same = len(items) == len(old) and all(new is now for new, now in zip(items, old, strict=True))
                return current if same else tuple(items)
            current.clear()
            current.extend(items)
            return current

        return fill


def _new_mapping(node: MappingNode, fills: Iterable[tuple[Any, Fill]], attributes: Fill | None) -> Any:
    kind = MAPPINGS[node.kind]
    made = kind() if node.factory is None else kind(node.factory)
    for key, fill in fills:
        made[key] = fill()
    if attributes is not None:
        made.__dict__.update(attributes())
    return made


def _new_sequence(node: SequenceNode, items: Iterable[Any]) -> Any:
    return deque(items, node.maxlen) if node.kind == "deque" else SEQUENCES[node.kind](items)


def _fit_value(node: ValueNode, current: Any, path: str) -> Fill:
    value = node.value
    if type(current) is not type(value) or not isinstance(current, (list, set)):
        return lambda: value
    if isinstance(current, list):
        _refuse_dropping((f"{path}.{index}", item) for index, item in enumerate(current))

    def fill() -> Any:
        current.clear()
        if isinstance(current, list):
            current.extend(value)
        else:
            current.update(value)
        return current

    return fill


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _is_same_kind(node: Node, current: Any) -> bool:
    if isinstance(node, TensorNode):
        return _is_array(current) if node.is_array else isinstance(current, Tensor)
    if isinstance(node, MappingNode):
        return type(current) is MAPPINGS[node.kind]
    if isinstance(node, SequenceNode):
        return type(current) is SEQUENCES[node.kind]
    return isinstance(node, ValueNode) and type(current) is type(node.value)


def _refuse_dropping(items: Iterable[tuple[str, Any]]) -> None:
    for path, item in items:
        if object_kind(item) is not None:
            raise StateError(
                f"state {path!r} is a {type(item).__name__} now and is not in the checkpoint",
                hint="bind what the captured run bound, or start a new job",
            )


def _mismatch(node: Node, current: Any, path: str) -> StateError:
    now = "is missing now" if current is _MISSING else f"is a {type(current).__name__} now"
    return StateError(
        f"state {path!r} was captured from a {_kind_name(node)} and {now}",
        hint="bind what the captured run bound, or start a new job",
    )


def _kind_name(node: Node) -> str:
    if isinstance(node, ObjectNode):
        return node.class_name
    if isinstance(node, TensorNode):
        return "ndarray" if node.is_array else "Tensor"
    return type(node.value).__name__ if isinstance(node, ValueNode) else node.kind
