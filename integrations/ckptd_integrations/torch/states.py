"""A checkpoint's states as plain nested dicts, as `state_dict()` returned them: what torch's own formats hold.

Each state is rank 0's, with the job's tensors whole. What another rank N had otherwise is below "rank-N", dict by dict:
only what differs from rank 0's is there. Tensors are mapped memory, in row-major order, and tied ones are one tensor.

What `torch.load(weights_only=True)` would refuse becomes something that it does not: arrays become tensors, NumPy's
scalars numbers, deques lists, frozensets sets, and defaultdicts dicts.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ckptd.storage.assembling import Assembled
from ckptd_integrations.torch.nodes import (
    MappingNode,
    Node,
    ObjectNode,
    SequenceNode,
    TensorNode,
    read_document,
)
from ckptd_integrations.torch.tensors import DTYPES

_KINDS: Mapping[str, type] = {"dict": dict, "defaultdict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
_NOTHING: Any = object()


def states_of(assembled: Assembled) -> dict[str, Any]:
    """Return all states by name; raises `DamagedError` for values that can't be read."""
    first = _Rank(assembled, 0)
    states = {name: first.build(node) for name, node in first.entries.items()}
    for rank in range(1, assembled.manifest.world_size):
        other = _Rank(assembled, rank)
        differs = {}
        for name, node in other.entries.items():
            found = other.difference(node, first, first.entries.get(name))
            if found is not _NOTHING:
                differs[name] = found
        if differs:
            states[f"rank-{rank}"] = differs
    return states


class _Rank:
    """What one rank had."""

    def __init__(self, assembled: Assembled, rank: int) -> None:
        self._assembled, self._rank = assembled, rank
        document = read_document(assembled.values(rank))
        self.entries = document.entries
        self._aliases, self._views = document.aliases, document.views
        self._made: dict[str, Tensor] = {}

    def build(self, node: Node) -> Any:
        """Return what a node stands for."""
        if isinstance(node, TensorNode):
            return self._tensor(node.name)
        if isinstance(node, ObjectNode):
            return self.build(node.content)
        if isinstance(node, SequenceNode):
            items = [self.build(item) for item in node.items]
            return tuple(items) if node.kind == "tuple" else items
        if isinstance(node, MappingNode):
            made = _KINDS[node.kind]()
            for key, item in node.items:
                made[_plain(key)] = self.build(item)
            if node.attributes is not None and isinstance(made, OrderedDict):
                # torch keeps the versions of modules there.
                made.__dict__.update(self.build(node.attributes))
            return made
        return _plain(node.value)

    def difference(self, node: Node, other: _Rank, others: Node | None) -> Any:
        """Return of a node what another rank does not have just so."""
        if isinstance(node, ObjectNode) and isinstance(others, ObjectNode):
            return self.difference(node.content, other, others.content)
        if isinstance(node, MappingNode) and isinstance(others, MappingNode):
            theirs = dict(others.items)
            pairs = [(key, self.difference(item, other, theirs.get(key))) for key, item in node.items]
            found = {_plain(key): item for key, item in pairs if item is not _NOTHING}
            return found or _NOTHING
        if others is not None and self._look(node) == other._look(others):
            return _NOTHING
        return self.build(node)

    def _look(self, node: Node) -> object:
        """Return what is the same for nodes that stand for the same."""
        if isinstance(node, TensorNode):
            first = self._aliases.get(node.name, node.name)
            elements = self._assembled.tensor(first, self._rank)
            # Of a tensor of the job there is but one, and so there is of what ranks have alike.
            return elements.dtype, elements.shape, elements.digest or first
        if isinstance(node, ObjectNode):
            return self._look(node.content)
        if isinstance(node, SequenceNode):
            return node.kind, [self._look(item) for item in node.items]
        if isinstance(node, MappingNode):
            return node.kind, [(repr(key), self._look(item)) for key, item in node.items]
        return type(node.value), repr(node.value)

    def _tensor(self, name: str) -> Tensor:
        first = self._aliases.get(name, name)
        made = self._made.get(first)
        if made is None:
            dtype, shape, _, data = self._assembled.tensor(first, self._rank)
            view = self._views.get(first)
            made = torch.frombuffer(data, dtype=DTYPES[dtype]) if data else torch.empty(0, dtype=DTYPES[dtype])
            made = made.view(shape)
            if view is not None and view.dtype is not None:
                made = torch.view_as_complex(made)
            self._made[first] = made
        return made


def _plain(value: Any) -> Any:
    """Return a value as something that is loaded without being asked what it is."""
    if isinstance(value, frozenset):
        return {_plain(item) for item in value}
    if isinstance(value, (list, tuple, set)) and type(value) in (list, tuple, set):
        return type(value)(_plain(item) for item in value)
    numpy = sys.modules.get("numpy")
    return value.item() if numpy is not None and isinstance(value, numpy.generic) else value
