"""Loading captured states into objects that know their own state.

Modules are filled by copying into their parameters and buffers. Optimizers, schedulers, scalers, loaders and modules
with code of their own load themselves, from tensors that are theirs to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ckptd.errors import StateError
from ckptd_integrations.torch.local_boxes import may_have_dtensors
from ckptd_integrations.torch.nodes import MappingNode, Node, ObjectNode, SequenceNode, TensorNode
from ckptd_integrations.torch.objects import (
    GENERATOR,
    MODULE,
    OPTIMIZER,
    STATEFUL,
    class_name,
    is_plain,
    loads_itself,
    write_generator,
)
from ckptd_integrations.torch.optimizers import check_groups, load_optimizer, state_like
from ckptd_integrations.torch.sources import CheckpointTensors

Fill = Callable[[], Any]
Build = Callable[[Node, str, Any], Fill]
"""Makes a function that makes an object of a node, with tensors like those in the last argument."""
_IN_MODEL = "in the model"
_SAME = "bind what the captured run bound, or start a new job"
_LOAD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What code that is handed a state it does not expect raises."""


def fit_object(node: ObjectNode, current: Any, path: str, tensors: CheckpointTensors, build: Build) -> Fill:
    """Check the state of an object against the object; the returned function loads it and returns the object.

    Raises `StateError` for what can be known without loading. What an object of the user's refuses while it loads is
    a `StateError` as well, but comes when other objects may have been filled.
    """
    if node.kind == MODULE:
        return _fit_module(node, current, path, tensors, build)
    now = class_name(current, node.kind)
    if node.kind != STATEFUL and now != node.class_name:
        raise StateError(f"state {path!r} was captured from a {node.class_name} and is a {now} now", hint=_SAME)
    if node.kind == OPTIMIZER:
        check_groups(node, current, path, tensors)
        make = build(node.content, path, state_like(node, current))
        return _loader(current, path, lambda: load_optimizer(current, make()))
    make = build(node.content, path, _like(node, current, path, tensors))
    if node.kind == GENERATOR:
        return _loader(current, path, lambda: write_generator(current, make()))
    if isinstance(current, torch.amp.GradScaler):
        _check_scaler(node, current, path)
    return _loader(current, path, lambda: current.load_state_dict(make()))


def _loader(current: Any, path: str, load: Callable[[], object]) -> Fill:
    def fill() -> Any:
        try:
            load()
        except _LOAD_ERRORS as error:
            raise StateError(
                f"state {path!r}, a {type(current).__name__}, did not accept what was captured from it:"
                f" {type(error).__name__}: {error}",
                hint="its load_state_dict has to accept what its state_dict returned; other objects may be filled now",
            ) from error
        return current

    return fill


def _fit_module(node: ObjectNode, module: nn.Module, path: str, tensors: CheckpointTensors, build: Build) -> Fill:
    content = node.content
    if not isinstance(content, MappingNode):
        # A module that overrides `state_dict` to return something else is the only one who knows what it is.
        make = build(content, path, None)
        return _loader(module, path, lambda: module.load_state_dict(make()))
    plain = is_plain(module)
    own: Mapping[str, Any] = module.state_dict(keep_vars=True) if plain else module.state_dict()
    captured = dict(content.items)
    if plain or not loads_itself(module):
        _check_names(captured, own, path)
    for key, item in captured.items():
        target = own.get(key)
        if not (isinstance(item, TensorNode) and isinstance(target, Tensor)):
            continue
        if plain:
            tensors.fill(item.name, target, f"{path}.{key}", _IN_MODEL)
        elif not is_lazy(target):
            tensors.check(item.name, target, f"{path}.{key}", _IN_MODEL)
    if plain:
        return lambda: module
    make = build(content, path, own)

    def load() -> None:
        state = make()
        if not hasattr(state, "_metadata") and hasattr(own, "_metadata"):
            state._metadata = own._metadata  # noqa: SLF001 - torch keeps the versions of modules there
        module.load_state_dict(state)

    return _loader(module, path, load)


def _check_names(captured: Mapping[str, Any], own: Mapping[str, Any], path: str) -> None:
    unexpected = [key for key in captured if key not in own]
    missing = [key for key in own if key not in captured]
    for keys, place in ((unexpected, "checkpoint and not in the model"), (missing, "model and not in the checkpoint")):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            wrapped = any(("." + key).startswith((".module.", "._orig_mod.")) for key in (*unexpected, *missing))
            raise StateError(
                f"tensor {f'{path}.{keys[0]}'!r} is in the {place}{more}",
                hint="attach the model as the captured run did: wrapped or compiled, or not" if wrapped else _SAME,
            )


def _check_scaler(node: ObjectNode, scaler: torch.amp.GradScaler, path: str) -> None:
    was_enabled = isinstance(node.content, MappingNode) and bool(node.content.items)
    if was_enabled != scaler.is_enabled():
        before, now = ("enabled", "disabled") if was_enabled else ("disabled", "enabled")
        raise StateError(f"scaler {path!r} was {before} when it was captured and is {now} now", hint=_SAME)


def _like(node: ObjectNode, current: Any, path: str, tensors: CheckpointTensors) -> Any:
    """Return the object's present state where it may hold DTensors, which new ones have to be like."""
    if node.kind != STATEFUL or not may_have_dtensors() or not _holds_shared(node.content, tensors):
        return None
    try:
        return current.state_dict()
    except _LOAD_ERRORS as error:
        raise StateError(
            f"state {path!r}, a {type(current).__name__}, can't say how its tensors are shared out:"
            f" its state_dict raised {type(error).__name__}: {error}",
            hint="make its state_dict work before it is attached",
        ) from error


def _holds_shared(node: Node, tensors: CheckpointTensors) -> bool:
    if isinstance(node, TensorNode):
        return tensors.is_of_job(node.name)
    if isinstance(node, MappingNode):
        return any(_holds_shared(item, tensors) for _, item in node.items)
    return isinstance(node, SequenceNode) and any(_holds_shared(item, tensors) for item in node.items)
