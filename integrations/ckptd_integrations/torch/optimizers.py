"""Optimizers: what has to be the same as before, what new state has to be like, and loading without a second copy.

A fresh optimizer has no state yet. What the captured run had for a parameter is made anew, on the parameter's device
and, where the parameter is a DTensor, shared out among the ranks as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ckptd.errors import StateError
from ckptd_integrations.torch.local_boxes import is_dtensor
from ckptd_integrations.torch.nodes import MappingNode, Node, ObjectNode, SequenceNode, TensorNode, plain
from ckptd_integrations.torch.sources import CheckpointTensors

_COUNTER = "step"
"""The state that torch keeps where it likes, whatever its parameter is."""
_IN_OPTIMIZER = "in the optimizer"
_IN_ORDER = "give the optimizer its parameters in the order of the captured run"


@dataclass(slots=True)
class ParameterState:
    """One tensor of an optimizer's state: of which parameter, and what the optimizer has there already."""

    parameter: Tensor
    key: str
    present: Any

    def make(self, tensors: CheckpointTensors, name: str, path: str) -> Tensor:
        """Return the tensor that will hold what was captured under `name`: the present one where it fits, or a new one.

        Raises `StateError` for one whose ranks' parts can't be known from the parameter.
        """
        if isinstance(self.present, Tensor) and tensors.fits(name, self.present):
            tensors.fill(name, self.present, path, _IN_OPTIMIZER)
            return self.present
        if self.key == _COUNTER:
            return tensors.make(name)
        if not is_dtensor(self.parameter):
            return tensors.make(name, device=self.parameter.device)
        if tensors.has_shape_of(name, self.parameter):
            return tensors.make(name, self.parameter)
        if tensors.is_cut(name):
            raise StateError(
                f"tensor {path!r} of shape {list(tensors.shape(name))} is shared out among the ranks in the checkpoint,"
                f" and its parameter of shape {list(self.parameter.shape)} does not say how",
                hint="let the optimizer make one step before it is attached, so that its state exists",
            )
        return tensors.make(name, device=self.parameter.to_local().device)


def state_like(node: ObjectNode, optimizer: Optimizer) -> Mapping[str, Any]:
    """Return what the tensors of a captured optimizer's state have to be like, in the form of its `state_dict()`."""
    content = node.content
    captured = content.find("state") if isinstance(content, MappingNode) else None
    if not isinstance(content, MappingNode) or not isinstance(captured, MappingNode):
        return {}
    parameters = dict(_parameters(content.find("param_groups"), optimizer))
    state = {}
    for index, item in captured.items:
        parameter = parameters.get(index)
        if isinstance(item, MappingNode) and parameter is not None:
            present = optimizer.state.get(parameter, {})
            state[index] = {key: ParameterState(parameter, key, present.get(key)) for key, _ in item.items}
    return {"state": state}


def _parameters(groups: Node | None, optimizer: Optimizer) -> Iterator[tuple[Any, Tensor]]:
    """Yield the optimizer's parameters with the numbers that the captured state has for them."""
    if not isinstance(groups, SequenceNode):
        return
    for group, own in zip(groups.items, optimizer.param_groups, strict=False):
        numbers = group.find("params") if isinstance(group, MappingNode) else None
        if numbers is not None:
            yield from zip(plain(numbers), own["params"], strict=False)


def check_groups(node: ObjectNode, optimizer: Optimizer, path: str, tensors: CheckpointTensors) -> None:
    """Raise `StateError` unless an optimizer has groups of parameters of the shapes that were captured.

    Of an imported state the number of parameters is known, often their order (`_orders`), and never their shapes.
    """
    counts = [len(group) for group in node.shapes] if node.shapes is not None else list(_counts(node.content))
    own = [[tuple(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]
    if counts != [len(group) for group in own]:
        raise StateError(
            f"optimizer {path!r} has parameter groups of {counts} parameters in the"
            f" checkpoint and of {[len(group) for group in own]} now",
            hint="bind what the captured run bound, or start a new job",
        )
    for number, (before, now) in enumerate(zip(node.shapes or (), own, strict=False)):
        for index, (shape, own_shape) in enumerate(zip(before, now, strict=True)):
            if shape != own_shape:
                raise StateError(
                    f"parameter {index} in group {number} of optimizer {path!r} is {list(shape)} in the checkpoint"
                    f" and {list(own_shape)} now",
                    hint=_IN_ORDER,
                )
    for kind, theirs, ours in _orders(node, optimizer, tensors):
        # Of other things it can't be told what belongs to what.
        if theirs != ours and Counter(theirs) == Counter(ours):
            index = next(at for at, (item, own_item) in enumerate(zip(theirs, ours, strict=True)) if item != own_item)
            raise StateError(
                f"parameter {index} of optimizer {path!r} has the {kind} {theirs[index]} in the checkpoint"
                f" and {ours[index]} now: the same parameters are in another order",
                hint=_IN_ORDER,
            )


def _orders(
    node: ObjectNode, optimizer: Optimizer, tensors: CheckpointTensors
) -> Iterator[tuple[str, Sequence[Hashable], Sequence[Hashable]]]:
    """Yield what tells parameters from one another: in words, of those in the checkpoint, and of the optimizer's own.

    Names are there when the optimizer was made with them, or when a state was written by names; an imported state
    tells by its own shapes where it has one for each parameter.
    """
    content = node.content
    groups = content.find("param_groups") if isinstance(content, MappingNode) else None
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    found = list(_parameters(groups, optimizer))
    numbers, parameters = [number for number, _ in found], [parameter for _, parameter in found]
    captured = list(_captured_names(groups)) or numbers
    if names and all(isinstance(name, str) for name in captured):
        yield "name", captured, names
    state = content.find("state") if isinstance(content, MappingNode) else None
    if node.shapes is not None or not isinstance(state, MappingNode):
        return
    of_number = dict(state.items)
    items = [dict(item.items) if isinstance(item := of_number.get(n), MappingNode) else {} for n in numbers]
    for key in items[0] if items else ():
        stored = [tensor for tensor in (item.get(key) for item in items) if isinstance(tensor, TensorNode)]
        if len(stored) == len(parameters):
            shapes = [tensors.shape(tensor.name) for tensor in stored]
            yield f"shape of {key}", shapes, [tuple(parameter.shape) for parameter in parameters]


def _captured_names(groups: Node | None) -> Iterator[Any]:
    for group in groups.items if isinstance(groups, SequenceNode) else ():
        names = group.find("param_names") if isinstance(group, MappingNode) else None
        if names is not None:
            yield from plain(names)


def _counts(content: Node) -> Iterator[int]:
    """Yield how many parameters each group has in an optimizer's state."""
    groups = content.find("param_groups") if isinstance(content, MappingNode) else None
    for group in groups.items if isinstance(groups, SequenceNode) else ():
        numbers = group.find("params") if isinstance(group, MappingNode) else None
        yield 0 if numbers is None else len(plain(numbers))


class _Numbers(list[Any]):
    """A list that knows its members: torch looks for the parameter of every tensor in it, which is quadratic."""

    def __init__(self, numbers: Iterable[Any] = ()) -> None:
        super().__init__(numbers)
        self._members = frozenset(self)

    def __contains__(self, number: object) -> bool:
        return number in self._members


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Have an optimizer load `state`, whose tensors become its own.

    torch keeps the tensors themselves when they have the dtype and device of their parameter. Two things that it
    changes are put right: wider state keeps its dtype, and a learning rate that is a tensor stays the same tensor.
    """
    old_groups = [dict(group) for group in optimizer.param_groups]
    for group in state.get("param_groups", ()):
        if type(group.get("params")) is list:
            group["params"] = _Numbers(group["params"])
    optimizer.load_state_dict(state)
    _keep_precision(optimizer, state)
    for old, new in zip(old_groups, optimizer.param_groups, strict=True):
        for key, value in new.items():
            before = old.get(key)
            if isinstance(value, Tensor) and isinstance(before, Tensor) and before.shape == value.shape:
                # It may be part of a captured CUDA graph, or lie on another device.
                before.copy_(value)
                new[key] = before


def _keep_precision(optimizer: Optimizer, state: dict[str, Any]) -> None:
    # `Optimizer.load_state_dict` converts floating-point state to its parameter's dtype. An optimizer that keeps
    # float32 moments of bfloat16 parameters would go on with other numbers than it had.
    captured, groups = state.get("state"), state.get("param_groups")
    if not isinstance(captured, dict) or not isinstance(groups, list):
        return
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        for index, parameter in zip(group["params"], own["params"], strict=True):
            live = optimizer.state.get(parameter, {})
            for key, value in captured.get(index, {}).items():
                loaded = live.get(key)
                if (
                    loaded is not value
                    and isinstance(value, Tensor)
                    and isinstance(loaded, Tensor)
                    and loaded.dtype != value.dtype
                ):
                    live[key] = value.to(loaded.device)
