"""Formats of plugins: found by name or by how files are named, imported when used, and held to their contract."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest

from ckptd.errors import ConfigError, NotFoundError, PluginError, StateError
from ckptd.plugin import FormatSpec
from ckptd.plugin.formats import Formats
from ckptd.plugin.manager import GROUP, PluginManager
from ckptd.storage.export import Source, Written
from ckptd.storage.importing import Cargo

CARGO = Cargo([], b"", {}, ("model",))


def export_fine(_source: Source, folder: Path) -> Written:
    """Write a file."""
    (folder / "x").write_text("x")
    return Written(1)


def export_badly(_source: Source, _folder: Path) -> Written:
    """Fail as no exporter may."""
    raise ZeroDivisionError("oh")


@contextmanager
def import_fine(_place: Path, _names: Mapping[str, str]) -> Iterator[Cargo]:
    """Find nothing."""
    yield CARGO


@contextmanager
def import_badly(_place: Path, _names: Mapping[str, str]) -> Iterator[Cargo]:
    """Fail as no importer may."""
    raise ZeroDivisionError("oh")
    yield CARGO


SPECS = [
    FormatSpec("fine", "a good one", "their_format:export_fine", "their_format:import_fine", ("*.fine", "FINE"), True),
    FormatSpec("bad", "a bad one", "their_format:export_badly", "their_format:import_badly", ("*.bad",)),
    FormatSpec("out", "only out", exporter="their_format:export_fine"),
    FormatSpec("absent", "not installed", "there_is_no_such_module:x", "their_format:missing", extra="torch"),
]


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> Formats:
    """The formats of a manager with one plugin, and nothing else."""
    plugin, module = ModuleType("their_plugin"), ModuleType("their_format")
    for name in ("export_fine", "export_badly", "import_fine", "import_badly"):
        setattr(module, name, globals()[name])
    from ckptd.plugin import hookimpl

    @hookimpl
    def ckptd_formats() -> list[FormatSpec]:
        return SPECS

    plugin.ckptd_formats = ckptd_formats
    monkeypatch.setitem(sys.modules, "their_plugin", plugin)
    monkeypatch.setitem(sys.modules, "their_format", module)
    reports: list[tuple[str, str]] = []
    found = PluginManager(
        lambda *report: reports.append(report), found=[EntryPoint("x", "their_plugin", GROUP)]
    ).formats
    assert not reports
    return found


def test_what_is_named_is_used(formats: Formats, tmp_path: Path) -> None:
    """A format's targets are imported and called."""
    source: Source = None  # type: ignore[assignment]
    assert formats.exporter("fine", splits=True)(source, tmp_path) == Written(1)
    with formats.importer("fine")(tmp_path, {}) as cargo:
        assert cargo is CARGO


def test_faults_become_errors(formats: Formats, tmp_path: Path) -> None:
    """What a target raises beyond its contract is an error that names the format; what the caller raises is not."""
    source: Source = None  # type: ignore[assignment]
    with pytest.raises(PluginError, match="format bad failed: ZeroDivisionError"):
        formats.exporter("bad")(source, tmp_path)
    with pytest.raises(PluginError, match="format bad failed"), formats.importer("bad")(tmp_path, {}):
        pass
    with pytest.raises(StateError, match="mine"), formats.importer("fine")(tmp_path, {}):
        raise StateError("mine")
    with pytest.raises(PluginError, match="needs there_is_no_such_module") as caught:
        formats.exporter("absent")
    assert caught.value.hint == "pip install 'ckptd[torch]'"
    with pytest.raises(PluginError, match="AttributeError"):
        formats.importer("absent")


def test_what_there_is_is_listed(formats: Formats) -> None:
    """An unknown name, and a format that can't do what is asked, are refused with those that can."""
    with pytest.raises(ConfigError) as caught:
        formats.exporter("tar")
    assert caught.value.hint == ("formats: fine (a good one), bad (a bad one), out (only out), absent (not installed)")
    with pytest.raises(ConfigError) as caught:
        formats.importer("out")
    assert "out" not in str(caught.value.hint)
    with pytest.raises(ConfigError, match="does not split") as caught:
        formats.exporter("out", splits=True)
    assert caught.value.hint == "formats that do: fine"


def test_files_tell_their_format(formats: Formats, tmp_path: Path) -> None:
    """A file's name or a file in the folder tells; two that fit, none, and nothing there are refused."""
    (tmp_path / "a.fine").write_text("")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/FINE").write_text("")
    (tmp_path / "other").write_text("")
    assert formats.detect(tmp_path / "a.fine") == formats.detect(tmp_path / "in") == formats.detect(tmp_path) == "fine"
    (tmp_path / "b.bad").write_text("")
    for place, kind in ((tmp_path, ConfigError), (tmp_path / "other", ConfigError), (tmp_path / "no", NotFoundError)):
        with pytest.raises(kind):
            formats.detect(place)


def test_first_party_formats_are_there() -> None:
    """What ships with ckptd is registered, and no torch is imported to know of it."""
    manager = PluginManager(lambda *_: None)
    assert {"safetensors", "dcp", "torch"} <= {spec.name for spec in manager.formats.specs}
