"""Nested states on their way into a checkpoint: torch's part of an import."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ckptd.storage.importing import WHOLE_STATE, Cargo, Incoming
from ckptd.storage.safetensors_files import Description
from ckptd.storage.stream import Buffers, Stream
from ckptd_integrations.torch.layouts import METADATA
from ckptd_integrations.torch.rng import RNG_NAME
from ckptd_integrations.torch.tensors import tabulate
from ckptd_integrations.torch.tree import Harvest, Holds
from ckptd_integrations.torch.values import any_object, choose, pack

_OF_A_RANK = re.compile(r"rank-\d+")


def cargo_of(
    states: dict[str, Any],
    names: Mapping[str, str],
    where: str,
    described: Description,
    elsewhere: Mapping[int, Stream] = MappingProxyType({}),
) -> Cargo:
    """Return states as an import brings them in, without a copy of any tensor that lies as an image has it.

    `elsewhere` has the elements of tensors that are in the states by their form only, by the address of those. With
    `names` a group may be a path of keys joined by dots. Raises `StateError` naming what can't be captured, and
    `ConfigError` for a group that is not there.
    """
    of_ranks = {name: states.pop(name) for name in list(states) if _OF_A_RANK.fullmatch(name)}
    named = {path.partition(".")[0] for path in names.values()}
    notes = [f"left out: {name}, what one rank had of its own" for name in of_ranks if name not in named]
    generators = states.pop(RNG_NAME, None)
    groups: dict[str, Any] = states
    if WHOLE_STATE in names.values() and len(states) != 1:
        groups = {WHOLE_STATE: states}
    groups = {**groups, **{path: item for path in names.values() for item in _at({**states, **of_ranks}, path)}}
    chosen = choose(groups, names, where)
    harvest = Harvest()
    entries = [(name, any_object(harvest.encode(item, name, Holds.TENSORS))) for name, item in chosen.items()]
    if generators is not None and not names:
        entries.append((RNG_NAME, harvest.encode(generators, RNG_NAME, Holds.TENSORS)))
    table = tabulate(harvest.names, harvest.tensors)
    views = {name: tuple(view) for name, view in table.views.items()}
    tensors = [
        Incoming(name, dtype, tuple(tensor.shape), elsewhere.get(tensor.data_ptr()) or elements_of(tensor))
        for name, dtype, tensor in zip(table.names, table.dtypes, table.tensors, strict=True)
    ]
    return Cargo(
        tensors,
        pack(entries, table.aliases, views),
        METADATA,
        tuple(chosen),
        described.step,
        described.metrics,
        tuple(notes),
    )


def _at(states: Mapping[str, Any], path: str) -> list[Any]:
    """Return what lies at a path of keys joined by dots, in a list; an empty one when nothing does."""
    item: Any = states
    for key in path.split("."):
        if isinstance(item, Mapping) and key in item:
            item = item[key]
        elif isinstance(item, (list, tuple)) and key.isdigit() and int(key) < len(item):
            item = item[int(key)]
        else:
            return []
    return [item]


def elements_of(tensor: Tensor) -> Stream:
    """Return a tensor's bytes in row-major order, where they lie if they lie like that."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return Buffers([flat.view(torch.uint8).numpy().data if flat.numel() else b""])
