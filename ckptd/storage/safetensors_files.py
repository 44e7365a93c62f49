"""Safetensors files as others write them: a file, one with an index, or a folder of such, by state.

    model.safetensors                               the state "model"
    model.safetensors.index.json                    the state "model", in the files that the index names
    rank-0/model.safetensors                        more of it: what rank 0 had of its own
    checkpoint.json                                 what ckptd's own export says of a folder

Only headers are read here. What a header says is held against the file's size before anybody relies on it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from math import isfinite, prod
from pathlib import Path
from typing import Any, NamedTuple

from ckptd.errors import ConfigError, DamagedError, NotFoundError, StateError
from ckptd.storage.boxes import Shape
from ckptd.storage.export import DESCRIPTION
from ckptd.storage.image import ITEM_BYTES, header_bytes, whole_numbers

_ENDING, _INDEX_ENDING = ".safetensors", ".safetensors.index.json"
_OF_RANK_0 = "rank-0"
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_LENGTH_BYTES = 8
IN_PART = "it is damaged, or was copied in part"
"""The hint about a file that is not what it should be."""


class FileRange:
    """A part of an open file, as a stream."""

    def __init__(self, descriptor: int, begin: int, size_bytes: int, where: str) -> None:
        self._descriptor, self._begin, self._where = descriptor, begin, where
        self.size_bytes = size_bytes

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill all of `into`; raises `DamagedError` when the file has become shorter."""
        done = 0
        while done < len(into):
            count = os.preadv(self._descriptor, [into[done:]], self._begin + offset + done)
            if not count:
                raise DamagedError(f"{self._where} has become shorter while it was read")
            done += count


class Found(NamedTuple):
    """A tensor in a file."""

    name: str
    """As the file has it."""
    dtype: str
    shape: Shape
    data: FileRange


class Description(NamedTuple):
    """What an export of ckptd says of itself."""

    step: int | None = None
    metrics: Mapping[str, float] = {}


def read_description(folder: Path) -> Description:
    """Return what an export says of itself; nothing for what is no export of ckptd."""
    try:
        document = json.loads((folder / DESCRIPTION).read_bytes())
        if "ckptd" not in document["producer"]:
            return Description()
        (step,) = whole_numbers([document["step"]])
        numbers = {str(name): float(value) for name, value in document["values"].items()}
        metrics = {name: value for name, value in numbers.items() if isfinite(value)}  # JSON has no others
        return Description(step, metrics)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return Description()


def open_states(place: Path, stack: ExitStack) -> dict[str, list[Found]]:
    """Return the tensors at `place` by the name of their state; files stay open as long as `stack` does.

    Raises `NotFoundError` when nothing is there, `ConfigError` for what is no such file, `DamagedError` for what can't
    be read, and `StateError` naming a tensor of a dtype that ckptd does not have.
    """
    if place.is_dir():
        return _open_folder(place, stack)
    if not place.exists():
        raise NotFoundError(f"there is no {place}")
    if place.name.endswith(_INDEX_ENDING):
        return {place.name.removesuffix(_INDEX_ENDING): _open_index(place, stack)}
    if not place.name.endswith(_ENDING):
        raise ConfigError(f"{place} is not named like a safetensors file", hint=f"its name should end with {_ENDING}")
    return {place.name.removesuffix(_ENDING): list(_open(place, stack).values())}


def _open_folder(folder: Path, stack: ExitStack) -> dict[str, list[Found]]:
    names = sorted(path.name for path in folder.iterdir())
    states: dict[str, list[Found]] = {}
    parts: set[str] = set()
    for name in (name for name in names if name.endswith(_INDEX_ENDING)):
        states[name.removesuffix(_INDEX_ENDING)] = _open_index(folder / name, stack)
        parts.update(_weight_map(folder / name).values())
    for name in (name for name in names if name.endswith(_ENDING) and name not in parts):
        state = name.removesuffix(_ENDING)
        if _PART.search(state):
            index = _PART.sub("", state) + _INDEX_ENDING
            raise NotFoundError(
                f"{folder / name} is a part of a state, and {index}, which says of what, is missing",
                hint="copy the index as well, or name the file itself if its part is all that you want",
            )
        if state in states:
            raise ConfigError(f"{folder} has both {name} and an index for that name", hint="name the one that you want")
        states[state] = list(_open(folder / name, stack).values())
    if (folder / _OF_RANK_0).is_dir():
        for state, found in _open_folder(folder / _OF_RANK_0, stack).items():
            states.setdefault(state, []).extend(found)
    if not states:
        raise NotFoundError(f"there is no safetensors file in {folder}")
    return states


def _open_index(index: Path, stack: ExitStack) -> list[Found]:
    weight_map = _weight_map(index)
    files = {file: _open(index.parent / file, stack) for file in sorted(set(weight_map.values()))}
    missing = [name for name, file in weight_map.items() if name not in files[file]]
    if missing:
        raise DamagedError(f"{index}: tensor {missing[0]!r} is not in {weight_map[missing[0]]}, where it should be")
    return [files[file][name] for name, file in weight_map.items()]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = {str(name): str(file) for name, file in json.loads(index.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"the index {index} can't be read") from error
    for file in found.values():
        if Path(file).name != file:
            raise DamagedError(f"the index {index} names the file {file!r}, which is not beside it")
    return found


def _open(path: Path, stack: ExitStack) -> dict[str, Found]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no {path}", hint="an index names it: copy it as well") from error
    stack.callback(os.close, descriptor)
    size_bytes = os.fstat(descriptor).st_size
    try:
        begin = header_bytes(os.pread(descriptor, _LENGTH_BYTES, 0))
    except DamagedError as error:
        what = f"{path} is no safetensors file: it does not begin with the length of a header"
        raise DamagedError(what, hint=IN_PART) from error
    if begin > size_bytes:
        raise DamagedError(f"{path} is shorter than its own header", hint=IN_PART)
    try:
        entries = json.loads(os.pread(descriptor, begin - _LENGTH_BYTES, _LENGTH_BYTES))
        entries.pop("__metadata__", None)
        return {found.name: found for found in _entries(entries, descriptor, begin, size_bytes, str(path))}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"the header of {path} can't be read", hint=IN_PART) from error


def _entries(
    entries: Mapping[str, Any], descriptor: int, data_begin: int, file_bytes: int, where: str
) -> Iterator[Found]:
    for name, entry in entries.items():
        dtype, shape = str(entry["dtype"]), whole_numbers(entry["shape"])
        begin, end = whole_numbers(entry["data_offsets"])
        if dtype not in ITEM_BYTES:
            raise StateError(
                f"{where}: tensor {name!r} is of dtype {dtype}, which can't be imported",
                hint=f"convert it to one of {', '.join(ITEM_BYTES)}",
            )
        if end - begin != ITEM_BYTES[dtype] * prod(shape) or data_begin + end > file_bytes:
            raise DamagedError(
                f"{where}: tensor {name!r} does not lie where the header says",
                hint=IN_PART,
            )
        yield Found(name, dtype, shape, FileRange(descriptor, data_begin + begin, end - begin, where))
