"""Torch files: what `torch.save` writes, and `torch.load(weights_only=True)` reads."""

from __future__ import annotations

import errno
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ckptd.errors import ConfigError, DamagedError, MemoryBudgetError, NotFoundError, StateError, StoreError
from ckptd.storage.assembling import assemble
from ckptd.storage.export import Source, Written
from ckptd.storage.importing import Cargo
from ckptd.storage.safetensors_files import read_description
from ckptd_integrations.torch.incoming import cargo_of
from ckptd_integrations.torch.states import states_of

FILE = "checkpoint.pt"
ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
_OF_TORCH = "it is damaged, was copied in part, or torch.save has not written it"
_NO_FILE_OF_TORCH = (
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    zipfile.BadZipFile,
)
_REFUSED = re.compile(r"(?:GLOBAL |global |instantiate |class )([A-Za-z_][\w.]*)")


def export_torch(source: Source, folder: Path) -> Written:
    """Write one torch file with all states by name; an `Exporter`.

    The state lies in the folder twice for a while, and in memory never: torch writes from a mapped file.
    """
    try:
        torch.save(states_of(assemble(source, folder)), folder / FILE)
    except RuntimeError as error:  # what torch makes of a full disk
        reason = str(error).splitlines()[0]
        raise StoreError(f"torch can't write {FILE}: {reason}", hint="is there room for it on that disk?") from error
    return Written(len(source.manifest.tensors) - 1)


@contextmanager
def import_torch(place: Path, names: Mapping[str, str]) -> Iterator[Cargo]:
    """Load a torch file, or the only one in a folder; an `Importer`, whose groups are the keys of its dict.

    A dict of tensors alone is one state, "model". The file is mapped where torch can do that, so its tensors take no
    memory; but the kernel maps no more than the machine has.
    """
    file = _file_of(place)
    states = _load(file)
    described = read_description(file.parent)
    if described.step is None and states and all(isinstance(item, torch.Tensor) for item in states.values()):
        states = {"model": states}
    yield cargo_of(states, names, str(file), described)


def _file_of(place: Path) -> Path:
    if not place.exists():
        raise NotFoundError(f"there is no {place}")
    if not place.is_dir():
        return place
    found = sorted(path for path in place.iterdir() if path.suffix in ENDINGS)
    if len(found) != 1:
        raise ConfigError(
            f"{place} has {len(found)} torch files" if found else f"there is no torch file in {place}",
            hint="name the file itself",
        )
    return found[0]


def _load(file: Path) -> dict[str, Any]:
    try:
        loaded = _read(file)
    except UnpicklingError as error:
        refused = _REFUSED.search(str(error))
        if refused is None:
            raise DamagedError(f"{file} is no file that torch can load", hint=_OF_TORCH) from error
        raise StateError(
            f"{file} holds a {refused[1]}, which is not loaded: it could run code",
            hint="load it where you trust it, and write its state_dict() with torch.save",
        ) from error
    except (*_NO_FILE_OF_TORCH, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which torch makes of a file that was cut
            raise
        if "unable to mmap" in str(error):
            raise MemoryBudgetError(
                f"{file} can't be mapped: it is larger than the memory that this process may have",
                hint="import it on a machine with more memory, or write it as safetensors first",
            ) from error
        raise DamagedError(f"{file} is no file that torch can load", hint=_OF_TORCH) from error
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise StateError(
            f"{file} holds a {type(loaded).__name__}, and not states by name", hint="save a dict of states"
        )
    return dict(loaded)


def _read(file: Path) -> Any:
    # Files of before torch 1.6 can't be mapped.
    return torch.load(str(file), map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
