"""Objects that know their own state: modules, optimizers, schedulers, scalers, loaders, generators.

What `state_dict()` returns is captured as it is, without copies. How it is loaded again depends on the kind: a module's
tensors are filled in place, everything else is loaded by the object itself.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from operator import attrgetter, eq
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

MODULE, OPTIMIZER, STRICT, STATEFUL, GENERATOR = "module", "optimizer", "strict", "stateful", "generator"
"""Kinds of objects. `STRICT` are those of torch whose state fits no other class, though loading it would not fail."""

_METHODS = (
    "state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict", "get_extra_state",
    "set_extra_state",
)  # fmt: skip
_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_FSDP = "torch.distributed.fsdp._fully_shard."
_VERSIONED = (_NormBase._load_from_state_dict, _InstanceNorm._load_from_state_dict)  # noqa: SLF001
"""Overrides of torch that only translate states of old versions."""


def object_kind(value: Any) -> str | None:
    """Return the kind of an object that has a state of its own, or None."""
    if isinstance(value, type):
        return None
    if isinstance(value, nn.Module):
        return MODULE
    if isinstance(value, Optimizer):
        return OPTIMIZER
    if isinstance(value, (LRScheduler, torch.amp.GradScaler)):
        return STRICT
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
        return STATEFUL
    return GENERATOR if _generator_access(value) is not None else None


def collect(value: Any, kind: str) -> tuple[Any, bool]:
    """Return an object's state, and whether attributes of the returned container belong to it.

    A plain module gives its parameters themselves, not detached ones: of 10,000 that would cost 20 ms.
    """
    if kind == MODULE and is_plain(value):
        return value.state_dict(keep_vars=True), False
    if kind == GENERATOR:
        return read_generator(value), True
    return value.state_dict(), True


def is_plain(module: nn.Module) -> bool:
    """Return whether a module's `state_dict()` is its parameters and buffers, and nothing but copying restores them.

    Extra state, hooks and overridden methods make it otherwise; then `load_state_dict` has to be called.
    """
    kinds: dict[type, bool] = {}
    for part in module.modules():
        kind = type(part)
        if kind not in kinds:
            kinds[kind] = all(_is_standard(kind, name) for name in _METHODS)
        attributes = part.__dict__
        if (
            not kinds[kind]
            or any(_has_hooks(attributes.get(name)) for name in _HOOKS)
            or not attributes.keys().isdisjoint(_METHODS)
        ):
            return False
    return True


def _has_hooks(hooks: Any) -> bool:
    """Return whether there are hooks that may change a state; those of FSDP2 only bring its shards back."""
    return bool(hooks) and any(not _is_of_fsdp(hook) for hook in hooks.values())


def _is_of_fsdp(hook: Any) -> bool:
    # Hooks that come before loading are wrapped.
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith(_FSDP)


def loads_itself(module: nn.Module) -> bool:
    """Return whether a module may accept a state with other names than its own, because code of its own loads it."""
    return any(
        _has_hooks(part.__dict__.get("_load_state_dict_pre_hooks"))
        or not _is_standard(type(part), "_load_from_state_dict")
        or not _is_standard(type(part), "load_state_dict")
        or not part.__dict__.keys().isdisjoint(_METHODS)
        for part in module.modules()
    )


def _is_standard(kind: type, name: str) -> bool:
    method = getattr(kind, name)
    return method is getattr(nn.Module, name) or method in _VERSIONED


Shapes = list[list[tuple[int, ...]]]
_shape = attrgetter("shape")


def parameter_shapes(optimizer: Any, known: Shapes | None) -> Shapes:
    """Return the shapes of an optimizer's parameters by group, so that a restore can compare them.

    Its state alone does not say: some optimizers keep factors whose shapes are others. It is `known`, what this has
    returned before, if they are the same: to make them anew would set off the garbage collector.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    if (
        known is not None
        and list(map(len, known)) == list(map(len, groups))
        and all(all(map(eq, map(_shape, group), shapes)) for group, shapes in zip(groups, known, strict=True))
    ):
        return known
    return [list(map(_shape, group)) for group in groups]


def class_name(value: Any, kind: str) -> str:
    """Return the name by which a restore tells that an object is of the class that was captured."""
    cls = type(value)
    if kind != GENERATOR:
        return cls.__qualname__  # Modules of torch move between versions; the names of their classes don't.
    bits = getattr(value, "bit_generator", value)
    return f"{cls.__module__}.{cls.__qualname__}" + ("" if bits is value else f"({type(bits).__name__})")


def read_generator(value: Any) -> Any:
    """Return the state of a random number generator that the user bound."""
    access = _generator_access(value)
    return None if access is None else access[0]()


def write_generator(value: Any, state: Any) -> None:
    """Set the state of a random number generator to what `read_generator` returned."""
    access = _generator_access(value)
    if access is not None:
        access[1](state)


def _generator_access(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate, value.setstate
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.RandomState):
        return lambda: value.get_state(legacy=False), value.set_state
    if isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return None
