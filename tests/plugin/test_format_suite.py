"""The conformance suite of formats, run on those that ship with ckptd, and on broken ones that it must catch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import SkipTest

import pytest

from ckptd.errors import CkptdError, DamagedError
from ckptd.plugin import FormatSpec
from ckptd.storage.export import Source, Written
from ckptd.storage.export_safetensors import export_safetensors
from ckptd.storage.importing import Cargo
from ckptd.storage.wholes import wholes
from ckptd.testing import FormatSuite
from ckptd_integrations.torch.import_safetensors import import_safetensors
from ckptd_integrations.torch.plugin import ckptd_formats
from ckptd_integrations.torch.values import any_object, pack


class OfTorch(FormatSuite):
    """Formats of checkpoints of torch."""

    def values(self, states: Mapping[str, Mapping[str, str]]) -> bytes:
        """Write the tree of dicts of tensors."""
        entries = []
        for state, held in states.items():
            flat = [item for key, name in held.items() for item in (key, ("tensor", name))]
            entries.append((state, any_object(("dict", flat))))
        return pack(entries, {}, {})


@pytest.mark.parametrize("spec", ckptd_formats(), ids=lambda spec: spec.name)
class TestFormats(OfTorch):
    """All formats that ship with ckptd."""


def into_store(source: Source, folder: Path) -> Written:
    """Note in the store what was exported."""
    source.tier.put(f"{source.job}/exported", b"")
    return export_safetensors(source, folder)


def beside(source: Source, folder: Path) -> Written:
    """Leave a file beside the folder."""
    (folder.parent / "log").write_text("")
    return export_safetensors(source, folder)


def unchecked(source: Source, folder: Path) -> Written:
    """Write bytes that nobody has checked."""
    try:
        return export_safetensors(source, folder)
    except DamagedError:
        return Written(1)


def not_whole(source: Source, folder: Path) -> Written:
    """Forget what was cut: write what the first rank has."""
    written = export_safetensors(source, folder)
    path = folder / "model.safetensors"
    tensor = next(tensor for tensor in wholes(source.manifest) if tensor.name == "model.weight")
    data = bytearray(path.read_bytes())
    data[-tensor.size_bytes * 2 :] = bytes(tensor.size_bytes * 2)
    path.write_bytes(data)
    return written


_OPEN: list[int] = []


@contextmanager
def never_closing(place: Path, names: Mapping[str, str]) -> Iterator[Cargo]:
    """Open a file for good."""
    _OPEN.append(os.open("/dev/null", os.O_RDONLY))
    with import_safetensors(place, names) as cargo:
        yield cargo


@contextmanager
def deaf(place: Path, _names: Mapping[str, str]) -> Iterator[Cargo]:
    """Import everything, whatever is asked for."""
    with import_safetensors(place, {}) as cargo:
        yield cargo


@contextmanager
def trusting(place: Path, names: Mapping[str, str]) -> Iterator[Cargo]:
    """Have an error of Python's for what can't be read."""
    try:
        with import_safetensors(place, names) as cargo:
            yield cargo
    except CkptdError as error:
        raise ValueError(str(error)) from error


@contextmanager
def tidying(place: Path, names: Mapping[str, str]) -> Iterator[Cargo]:
    """Remove what was imported."""
    with import_safetensors(place, names) as cargo:
        yield cargo
    (place / "model.safetensors").write_bytes(b"")


class Straight:
    """A stream that only goes forward."""

    def __init__(self, stream: object) -> None:
        self._stream, self._at = stream, 0
        self.size_bytes = stream.size_bytes

    def read_into(self, _offset: int, into: memoryview) -> None:
        """Read on."""
        self._at = self._at if self._at + len(into) <= self.size_bytes else 0
        self._stream.read_into(self._at, into)
        self._at += len(into)


@contextmanager
def straight(place: Path, names: Mapping[str, str]) -> Iterator[Cargo]:
    """Hand out streams that only go forward."""
    with import_safetensors(place, names) as cargo:
        cargo.tensors[:] = [tensor._replace(data=Straight(tensor.data)) for tensor in cargo.tensors]
        yield cargo


@pytest.mark.parametrize(
    ("exporter", "importer", "test"),
    [
        (into_store, import_safetensors, "test_exports_into_its_folder"),
        (beside, import_safetensors, "test_exports_into_its_folder"),
        (unchecked, import_safetensors, "test_exports_nothing_damaged"),
        (not_whole, import_safetensors, "test_imports_what_it_exported"),
        (export_safetensors, tidying, "test_imports_what_it_exported"),
        (export_safetensors, never_closing, "test_closes_what_it_opens"),
        (export_safetensors, deaf, "test_imports_a_group_under_a_name"),
        (export_safetensors, trusting, "test_refuses_what_it_can_not_read"),
        (export_safetensors, straight, "test_streams_can_be_read_anywhere"),
    ],
)
def test_suite_catches(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    exporter: Callable[..., object],
    importer: Callable[..., object],
    test: str,
) -> None:
    """The suite fails a format that breaks the contract in a typical way, in the test that names it."""
    module = ModuleType("their_format")
    module.out, module.into = exporter, importer
    monkeypatch.setitem(sys.modules, "their_format", module)
    spec = FormatSpec("theirs", "a broken one", "their_format:out", "their_format:into")
    try:
        with pytest.raises((AssertionError, ValueError)):
            getattr(OfTorch(), test)(spec, tmp_path)
    finally:
        while _OPEN:
            os.close(_OPEN.pop())


def test_what_a_format_can_not_do_is_not_asked(tmp_path: Path) -> None:
    """A format that only exports is not asked for imports, and the other way round."""
    only_out = FormatSpec("out", "only out", exporter="ckptd.storage.export_safetensors:export_safetensors")
    OfTorch().test_closes_what_it_opens(only_out, tmp_path)
    only_in = FormatSpec("in", "only in", importer="ckptd_integrations.torch.import_safetensors:import_safetensors")
    for spec in (only_out, only_in):
        with pytest.raises(SkipTest, match="does not"):
            OfTorch().test_imports_what_it_exported(spec, tmp_path)
