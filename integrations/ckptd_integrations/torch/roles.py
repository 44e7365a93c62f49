"""What the tensors of a capture are: changed by an optimizer's step and nothing else, or held alike by all ranks.

Both follow from who holds them, not from what they are. Parameters of plain modules and what optimizers keep are found
by identity, which costs next to nothing; a module with code of its own hands out other tensors with the same memory,
and only for those memory is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any, NamedTuple

from torch import Tensor

from ckptd.client.framework import Membership
from ckptd_integrations.torch.replication import Replicas, has_same_state, parameter_ids
from ckptd_integrations.torch.tensors import TensorTable
from ckptd_integrations.torch.tree import Harvest, Stepping


class Roles(NamedTuple):
    """By index in the table of tensors; the same object as long as nothing changed."""

    stepped: list[bool]
    """Those that only an optimizer's step changes: its parameters and its state, but not what is in its groups, such
    as a learning rate that is a tensor."""
    replicated: list[bool]
    """Those that all ranks hold alike. Of DTensors their placements say it."""


class RoleFinder:
    """Finds the roles of each capture's tensors, and returns the last ones while the same objects play them."""

    def __init__(self, membership: Membership) -> None:
        self._named = frozenset(membership.replicated or ())
        self._shares = membership.world_size > 1
        # Who names what is replicated knows better than a search.
        self._replicas = Replicas(membership.world_size if membership.replicated is None else 1)
        self._key: tuple[list[str], list[int], list[int], list[int]] | None = None
        self._roles = Roles([], [])

    def find(self, harvest: Harvest, roots: Sequence[tuple[str, int, int]], table: TensorTable) -> Roles:
        """Return the roles of `table`, which was made of `harvest`; `roots` are the state's names and their tensors."""
        # A state of a generator, which comes last, is another tensor each time.
        lasting = harvest.tensors[: roots[-1][2]] if roots else []
        optimizers = [stepping.optimizer for stepping in harvest.optimizers]
        same = self._replicas.parameters()
        key = (table.names, list(map(id, lasting)), parameter_ids(optimizers), list(map(id, same)))
        if key == self._key:
            return self._roles
        own = [item for optimizer in optimizers for group in optimizer.param_groups for item in group["params"]]
        stepped = _mark(table, own, [item for each in harvest.optimizers for item in _state(harvest, each)])
        replicated = [False] * len(table.names)
        if self._shares and self._named:
            alike = [item for name, begin, end in roots if name in self._named for item in harvest.tensors[begin:end]]
            replicated = _mark(table, [], alike)
        elif same:
            ids = frozenset(map(id, same))
            alike = [
                item
                for stepping in harvest.optimizers
                if has_same_state(stepping.optimizer, ids)
                for item in _state(harvest, stepping)
            ]
            replicated = _mark(table, same, alike)
        found = Roles(stepped, replicated)
        self._key = key
        if found != self._roles:
            self._roles = found
        return self._roles

    def close(self) -> None:
        """Look for wrappers no more."""
        self._replicas.close()


def _state(harvest: Harvest, stepping: Stepping) -> list[Tensor]:
    """Return the tensors of an optimizer's state that only its step changes."""
    gathered = harvest.tensors[stepping.begin : stepping.end]
    in_groups: set[int] = set()
    for group in stepping.optimizer.param_groups:
        for name, value in group.items():
            if name != "params":
                in_groups.update(map(id, _tensors(value)))
    return [item for item in gathered if id(item) not in in_groups] if in_groups else gathered


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        yield from (item for item in value if isinstance(item, Tensor))


def _mark(table: TensorTable, parameters: Sequence[Tensor], others: Sequence[Tensor]) -> list[bool]:
    """Return which tensors of the table are among the given ones, or hold memory of the parameters only."""
    here = list(map(id, table.owners))
    wanted = {*map(id, parameters), *map(id, others)}
    marks = [number in wanted for number in here]
    elsewhere = set(map(id, parameters)).difference(here)
    if elsewhere:
        ends = {item.data_ptr(): item.nbytes for item in parameters if id(item) in elsewhere and _is_dense(item)}
        for index in compress(range(len(marks)), [pointer in ends for pointer in table.pointers]):
            tensor = table.tensors[index]
            marks[index] |= tensor.is_contiguous() and 0 < tensor.nbytes <= ends[table.pointers[index]]
    return marks


def _is_dense(tensor: Tensor) -> bool:
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.is_contiguous()
