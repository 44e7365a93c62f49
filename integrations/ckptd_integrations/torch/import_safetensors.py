"""Import of safetensors files: each state is a dict of tensors, as a module's is. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ckptd.storage.importing import Cargo, Incoming
from ckptd.storage.safetensors_files import open_states, read_description
from ckptd_integrations.torch.values import METADATA, RESERVED, any_object, choose, initial_names, pack, unique


@contextmanager
def import_safetensors(place: Path, names: Mapping[str, str]) -> Iterator[Cargo]:
    """Open safetensors files; an `Importer`, whose groups are the files by their names without endings."""
    with ExitStack() as stack:
        groups = open_states(place, stack)
        generators = groups.pop(RESERVED, None) if len(groups) > 1 else None
        states = choose(groups, names, str(place))
        used = initial_names()
        tensors: list[Incoming] = []
        entries = []
        for state, found in states.items():
            node = []
            for tensor in found:
                name = unique(f"{state}.{tensor.name}", used)
                tensors.append(Incoming(name, tensor.dtype, tensor.shape, tensor.data))
                node += [tensor.name, ("tensor", name)]
            entries.append((state, any_object(("dict", node))))
        described = read_description(place if place.is_dir() else place.parent)
        # Of a file there is no rank's folder below.
        notes = [
            f"left out: {path.name}, what one rank had of its own"
            for path in sorted(place.glob("rank-*"))
            if path.is_dir() and path.name != "rank-0"
        ]
        if generators is not None:
            notes.append("left out: generators of random numbers, which safetensors can't hold whole")
        yield Cargo(
            tensors, pack(entries, {}, {}), METADATA, tuple(states), described.step, described.metrics, tuple(notes)
        )
