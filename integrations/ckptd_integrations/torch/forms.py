"""The form that an imported state takes: that of what is bound.

An import knows no classes: a file has a dict where there was a module or an optimizer, a list where there was a deque,
and the name of one module for a tensor that several share. What was captured has to fit as it is.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ckptd.errors import StateError
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
from ckptd_integrations.torch.objects import MODULE, OPTIMIZER, class_name, object_kind
from ckptd_integrations.torch.values import ANY

_LISTS: Mapping[type, Callable[[Any], Any]] = {list: list, tuple: tuple, set: set, deque: list}


def is_any(node: Node) -> bool:
    """Return whether a node is of an imported state."""
    return isinstance(node, ObjectNode) and node.kind == ANY


def formed(node: Node, current: Any, path: str) -> Node:
    """Return the node that fits `current`, which is bound at `path`, as far as there is one; one level deep.

    Raises `StateError` for an optimizer of which only tensors were imported.
    """
    if not isinstance(node, ObjectNode) or node.kind != ANY:
        return node
    content = node.content
    # Asking a tensor whether it is a generator takes longer than all else that is done with it.
    kind = None if isinstance(current, Tensor) else object_kind(current)
    if kind is None:
        return _like(content, current)
    if kind == MODULE and isinstance(content, MappingNode):
        content = _with_tied(content, current)
    if kind == OPTIMIZER and isinstance(content, MappingNode) and content.find("param_groups") is None:
        raise StateError(
            f"state {path!r} was imported without its param_groups, and an optimizer can't begin with tensors alone",
            hint="import the model only (--as NAME=GROUP), or import from the dcp or torch format",
        )
    return ObjectNode(kind, class_name(current, kind), content, None)


def _like(node: Node, current: Any) -> Node:
    kind = type(current)
    if isinstance(node, TensorNode):
        numpy = sys.modules.get("numpy")
        return TensorNode(node.name, numpy is not None and isinstance(current, numpy.ndarray))
    if isinstance(node, MappingNode):
        factory = getattr(current, "default_factory", None)
        known = kind.__name__ if MAPPINGS.get(kind.__name__) is kind else node.kind
        return MappingNode(known, [(key, _any(item)) for key, item in node.items], factory, node.attributes)
    if isinstance(node, SequenceNode):
        known = kind.__name__ if SEQUENCES.get(kind.__name__) is kind else node.kind
        return SequenceNode(known, [_any(item) for item in node.items], getattr(current, "maxlen", None))
    if isinstance(node, ValueNode) and type(node.value) in _LISTS and kind in _LISTS:
        if kind is deque:
            return SequenceNode("deque", [ValueNode(item) for item in node.value], current.maxlen)
        return ValueNode(_LISTS[kind](node.value))
    return node


def _any(node: Node) -> Node:
    return ObjectNode(ANY, "", node, None)


def _with_tied(content: MappingNode, module: nn.Module) -> MappingNode:
    """Return a module's state with all names of tensors that were stored once: files of safetensors have but one."""
    captured = dict(content.items)
    names: dict[int, list[str]] = {}
    for key, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(key)
    tied = [
        (key, captured[first])
        for together in names.values()
        for first in [next((key for key in together if key in captured), None)]
        if first is not None
        for key in together
        if key not in captured
    ]
    return content._replace(items=[*content.items, *tied]) if tied else content
