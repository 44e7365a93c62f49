"""The formats that plugins know: found by name or by how files are named, and imported when they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ckptd.errors import ConfigError, NotFoundError, PluginError
from ckptd.plugin.contracts import FormatSpec
from ckptd.storage.export import Exporter, Source, Written
from ckptd.storage.importing import Cargo, Importer

Result = TypeVar("Result")


class Caller(Protocol):
    """Calls a foreign function for the format `name`, and turns its faults into errors."""

    def __call__(self, name: str, function: Callable[..., Result], *arguments: object) -> Result:
        """Return the function's result."""
        ...


class Formats:
    """All formats of one manager, the ones that were registered first first."""

    def __init__(self, specs: Sequence[FormatSpec], call: Caller) -> None:
        self.specs = tuple(specs)
        self._call = call

    def exporter(self, name: str, *, splits: bool = False) -> Exporter:
        """Return what exports to a format; raises `ConfigError` that lists what there is, and `PluginError`.

        With `splits` it has to be one that heeds how much may go into one file.
        """
        spec = self._find(name, "exporter")
        if splits and not spec.splits:
            known = ", ".join(item.name for item in self.specs if item.splits and item.exporter)
            raise ConfigError(f"format {name} does not split files", hint=f"formats that do: {known or 'none'}")
        target: Exporter = self._import(spec, spec.exporter)

        def export(source: Source, folder: Path) -> Written:
            return self._call(name, target, source, folder)

        return export

    def importer(self, name: str) -> Importer:
        """Return what imports from a format; raises `ConfigError` that lists what there is, and `PluginError`."""
        spec = self._find(name, "importer")
        target: Importer = self._import(spec, spec.importer)

        @contextmanager
        def opened(place: Path, names: Mapping[str, str]) -> Iterator[Cargo]:
            with ExitStack() as stack:
                context = self._call(name, target, place, names)
                yield self._call(name, stack.enter_context, context)

        return opened

    def detect(self, place: Path) -> str:
        """Return the format of what lies at `place`; raises `ConfigError` unless its names fit exactly one.

        Raises `NotFoundError` when nothing is there.
        """
        if not place.exists():
            raise NotFoundError(f"there is no {place}", hint="FROM is a file or a folder of this machine")
        names = [path.name for path in place.iterdir()] if place.is_dir() else [place.name]
        fitting = [
            spec.name
            for spec in self.specs
            if spec.importer and any(fnmatchcase(name, sign) for name in names for sign in spec.signs)
        ]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise ConfigError(f"{place} may be {' or '.join(fitting)}", hint="say which it is: --format NAME")
        raise ConfigError(
            f"nothing at {place} says what format it is", hint=f"say it: --format NAME; {self._known('importer')}"
        )

    def _find(self, name: str, use: str) -> FormatSpec:
        for spec in self.specs:
            if spec.name == name and getattr(spec, use):
                return spec
        raise ConfigError(f"there is no {use} for a format {name!r}", hint=self._known(use))

    def _known(self, use: str) -> str:
        known = [f"{spec.name} ({spec.about})" for spec in self.specs if getattr(spec, use)]
        return f"formats: {', '.join(known) or 'none'}"

    def _import(self, spec: FormatSpec, target: str) -> Any:
        module, _, attribute = target.partition(":")
        return self._call(spec.name, _load, module, attribute, spec)


def _load(module: str, attribute: str, spec: FormatSpec) -> Any:
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise PluginError(
            f"format {spec.name} needs {error.name}, which is not installed here",
            hint=f"pip install 'ckptd[{spec.extra}]'" if spec.extra else None,
        ) from error
