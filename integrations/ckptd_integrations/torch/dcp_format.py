"""Folders of torch.distributed.checkpoint (DCP): written by that library, read without running what is in them.

torch reads such a folder's metadata, and everything in it that is no tensor, as pickles that may run any code. Here the
metadata is read as data (`inert`), and everything else by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from ckptd.errors import DamagedError, NotFoundError, StateError, StoreError
from ckptd.storage.assembling import assemble
from ckptd.storage.export import Source, Written
from ckptd.storage.image import is_inside
from ckptd.storage.importing import Cargo
from ckptd.storage.safetensors_files import IN_PART, read_description
from ckptd.storage.stream import Stream
from ckptd_integrations.torch import inert
from ckptd_integrations.torch.incoming import cargo_of, elements_of
from ckptd_integrations.torch.states import states_of

METADATA_FILE = ".metadata"
_PACKAGE = "torch.distributed.checkpoint"
_TENSOR, _BYTES = f"{_PACKAGE}.metadata.TensorStorageMetadata", f"{_PACKAGE}.metadata.BytesStorageMetadata"


def export_dcp(source: Source, folder: Path) -> Written:
    """Write what `dcp.save` makes of all states by name; an `Exporter`.

    The state lies in the folder twice for a while; in memory is one tensor at a time.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are no other ranks is meant
            save(states_of(assemble(source, folder)), storage_writer=FileSystemWriter(folder, sync_files=False))
    except CheckpointException as error:
        raise _failure(error) from error
    return Written(len(source.manifest.tensors) - 1)


def _failure(error: CheckpointException) -> OSError | StateError | StoreError:
    """Return what torch wraps: one line is enough, where it prints the tracebacks of all ranks."""
    cause, _ = next(iter(error.failures.values()))
    if isinstance(cause, OSError):
        return cause
    if isinstance(cause, ValueError):
        # Names are joined by dots there, and may come together.
        return StateError(f"DCP can't hold this state: {cause}", hint="use the torch or safetensors format")
    return StoreError(
        f"torch can't write the folder: {type(cause).__name__}: {cause}", hint="look for room on that disk"
    )


@contextmanager
def import_dcp(place: Path, names: Mapping[str, str]) -> Iterator[Cargo]:
    """Load a DCP folder; an `Importer`, whose groups are the keys of the dict that was given to `dcp.save`.

    Tensors are loaded when they are read, one at a time.
    """
    path = place / METADATA_FILE
    if not path.is_file():
        raise NotFoundError(f"there is no {path}", hint="a DCP folder has one; it is written last")
    with path.open("rb") as file:
        metadata = inert.read(file, str(path))
    try:
        elsewhere: dict[int, Stream] = {}
        items = _items(metadata, _stored(metadata, place), elsewhere)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DamagedError(f"{path} does not describe a checkpoint that can be read", hint=IN_PART) from error
    yield cargo_of(items, names, str(place), read_description(place), elsewhere)


class _Part(NamedTuple):
    """Where a part of a tensor, or a value, lies."""

    offset: tuple[int, ...]
    file: Path
    begin: int
    size_bytes: int


def _stored(metadata: Any, folder: Path) -> dict[str, list[_Part]]:
    """Return where everything lies, by its flat name."""
    found: dict[str, list[_Part]] = {}
    for index, info in metadata.state["storage_data"].items():
        where = info.state
        file, name = str(where["relative_path"]), str(index.state["fqn"])
        if os.path.basename(file) != file:
            raise DamagedError(f"{folder / METADATA_FILE} names the file {file!r}, which is not beside it")
        if where.get("transform_descriptors"):
            raise StateError(
                f"{folder}: {name!r} is stored in a form of its own ({', '.join(where['transform_descriptors'])})",
                hint="load it with torch, and write it with dcp.save without extensions",
            )
        offset = index.state.get("offset")
        part = _Part(
            () if offset is None else _sizes(offset), folder / file, int(where["offset"]), int(where["length"])
        )
        found.setdefault(name, []).append(part)
    return found


def _items(metadata: Any, stored: Mapping[str, list[_Part]], elsewhere: dict[int, Stream]) -> dict[str, Any]:
    """Load all values, and nest everything as it was before it was flattened.

    A tensor has its dtype and shape there and takes no memory; its elements go into `elsewhere`, by its address.
    """
    paths = metadata.state.get("planner_data") or {}
    desk = _Desk()
    states: dict[str, Any] = {}
    for name, described in metadata.state["state_dict_metadata"].items():
        if described.name == _TENSOR:
            value: Any = _form(described.state)
            elsewhere[value.data_ptr()] = _Elements(name, value, stored[name], desk)
        elif described.name == _BYTES:
            value = _load(name, stored[name][0])
        else:
            raise TypeError(described.name)
        path = paths.get(name, (name,))
        _place(states, path if isinstance(path, tuple) else (path,), value)
    for state in states.values():
        _restore_numbers(state)
    return states


def _form(described: Mapping[str, Any]) -> Tensor:
    """Return a tensor of the dtype and shape that is described, all of whose elements are one."""
    dtype = getattr(torch, described["properties"].state[0].name.removeprefix("torch."))
    return torch.empty((), dtype=dtype).expand(_sizes(described["size"]))


class _Desk:
    """Where the tensor lies that is being read: one of them, until another one is."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._owner: _Elements | None = None
        self._elements: Stream | None = None

    def read(self, owner: _Elements, offset: int, into: memoryview) -> None:
        """Read a tensor's elements, loaded if it is not the one that lies here."""
        with self._lock:  # also while they are copied: nobody then holds another tensor
            if self._elements is None or self._owner is not owner:
                self._elements = None  # first, so that there are not two
                self._owner, self._elements = owner, owner.load()
            self._elements.read_into(offset, into)


class _Elements:
    """The elements of a tensor in row-major order, loaded when they are read; a `Stream`."""

    def __init__(self, name: str, form: Tensor, parts: list[_Part], desk: _Desk) -> None:
        self._name, self._form, self._parts, self._desk = name, form, parts, desk
        self.size_bytes = form.numel() * form.itemsize

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill all of `into`; raises what `load` raises."""
        self._desk.read(self, offset, into)

    def load(self) -> Stream:
        """Load all elements; raises `DamagedError`, `StateError` or `NotFoundError` when that can't be done."""
        return elements_of(_tensor(self._name, self._form, self._parts))


def _tensor(name: str, form: Tensor, parts: list[_Part]) -> Tensor:
    shape = tuple(form.shape)
    made: Tensor | None = None
    elements = 0
    for part in parts:
        loaded = _load(name, part)
        offset = part.offset or (0,) * len(shape)
        fits = isinstance(loaded, Tensor) and is_inside(offset, tuple(loaded.shape), shape)
        if not fits or loaded.dtype != form.dtype:
            raise DamagedError(f"{part.file}: the part of {name!r} is not what the metadata says")
        if made is None:
            made = loaded if loaded.shape == shape else torch.empty_like(form)
        if made is not loaded:
            made[tuple(slice(at, at + size) for at, size in zip(offset, loaded.shape, strict=True))] = loaded
        elements += loaded.numel()
    if made is None or elements != prod(shape):
        raise DamagedError(f"the parts of {name!r} do not make up the whole")
    return made


def _load(name: str, part: _Part) -> Any:
    try:
        with part.file.open("rb") as file:
            file.seek(part.begin)
            data = file.read(part.size_bytes)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no {part.file}, which {name!r} is in") from error
    except UnpicklingError as error:
        raise StateError(
            f"{part.file}: {name!r} is of a type that is not loaded: it could run code",
            hint="load it where you trust it, and write only tensors and plain values with dcp.save",
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise DamagedError(f"{part.file}: {name!r} can't be loaded", hint=IN_PART) from error


def _place(root: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    """Put a value where a path of keys and list indexes leads."""
    inner: Any = root
    for key, following in zip(path, (*path[1:], None), strict=True):
        is_last = following is None
        made = value if is_last else [] if isinstance(following, int) else {}
        if isinstance(inner, list):
            inner += [None] * (key + 1 - len(inner))
            inner[key] = made if is_last or inner[key] is None else inner[key]
        elif is_last:
            inner[key] = made
        else:
            inner.setdefault(key, made)
        inner = inner[key]


def _restore_numbers(state: Any) -> None:
    """Give the state of optimizers, wherever in `state` they are, the numbers as keys that DCP made text of.

    An optimizer that has no state has no entry in DCP at all.
    """
    if isinstance(state, list):
        for item in state:
            _restore_numbers(item)
    elif isinstance(state, dict):
        if isinstance(state.get("param_groups"), list):
            inner = state.get("state", {})
            state["state"] = {int(key) if key.isdigit() else key: item for key, item in inner.items()}
            return
        for item in state.values():
            _restore_numbers(item)


def _sizes(size: Any) -> tuple[int, ...]:
    """Return a `torch.Size` that was read as data."""
    return tuple(int(number) for number in size.arguments[0])
