"""Where a job's checkpoints go and what stays there: a `StoreConfig` for each tier, as flags and TOML files say it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptd.errors import ConfigError
from ckptd.units import parse_duration, parse_size

DEFAULT_KEEP_LAST = 3
_BEST = re.compile(r"(?P<metric>[^:\s]+):(?P<mode>min|max):(?P<count>[1-9]\d{0,5})")
_STEPS = re.compile(r"\s*([1-9]\d{0,17})\s*steps?\s*")


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """One tier of a job: its place, what retention keeps there, and how much goes there."""

    url: str
    keep_last: int = DEFAULT_KEEP_LAST
    keep_every_s: float = 0.0
    keep_every_steps: int = 0
    keep_best: str = ""
    """`metric:min:count` or `metric:max:count`."""
    keep_tagged: bool = True
    max_bytes: int = 0
    """What all checkpoints may take there; 0: no bound."""
    every_s: float = 0.0
    """No more than one checkpoint in so many seconds is uploaded; 0: as many as get through. Not for the first tier."""
    backlog: int = 2
    """How many checkpoints may wait for their upload."""
    upload_max_bytes_per_s: int = 0
    """What uploads may send in a second; 0: as much as gets through."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """For the plugin that opens it, which refuses what it does not know."""

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        _require(bool(self.url), "no store is named", "say where checkpoints go, like --store ./runs")
        _require(self.keep_last >= 1, f"keep_last is {self.keep_last}", "at least 1 checkpoint must stay")
        _require(self.backlog >= 1, f"backlog is {self.backlog}", "at least 1 checkpoint must be able to wait")
        _require(
            not self.keep_best or _BEST.fullmatch(self.keep_best) is not None,
            f"keep_best is {self.keep_best!r}",
            'write it like "loss:min:3": a metric that is reported, min or max, and how many',
        )

    @property
    def best(self) -> tuple[str, str, int] | None:
        """The metric, "min" or "max", and the count of `keep_best`."""
        found = _BEST.fullmatch(self.keep_best)
        return None if found is None else (found["metric"], found["mode"], int(found["count"]))

    def to_json(self) -> dict[str, Any]:
        """Return the form that crosses the socket and stands in the journal."""
        data = dataclasses.asdict(self)
        data["options"] = dict(self.options)
        return data


def read_stores(value: object, keep_last: int) -> tuple[StoreConfig, ...]:
    """Return the tiers that JSON or TOML names, fastest first: a place, a table, or a list of either.

    `keep_last` is for those that don't say it. Raises `ConfigError` that names what does not fit.
    """
    items = value if isinstance(value, (list, tuple)) else [value]
    stores = tuple(_read_store(item, keep_last) for item in items)
    _require(bool(stores), "no store is named", "say where checkpoints go, like --store ./runs")
    urls = [store.url for store in stores]
    for url in urls:
        _require(urls.count(url) == 1, f"store {url} is named twice", "each tier is a place of its own")
    return stores


def absolute_stores(stores: tuple[StoreConfig, ...], folder: Path) -> tuple[StoreConfig, ...]:
    """Return the same stores as they are seen from everywhere."""
    return tuple(dataclasses.replace(store, url=absolute_store(store.url, folder)) for store in stores)


def absolute_store(url: str, folder: Path) -> str:
    """Return a store that means the same from everywhere: URLs stay, paths become absolute."""
    return url if "://" in url else os.path.normpath(folder / Path(url).expanduser())


def _read_store(item: object, keep_last: int) -> StoreConfig:
    if isinstance(item, StoreConfig):
        return item
    table = {"url": item} if isinstance(item, str) else item
    if not isinstance(table, Mapping) or not isinstance(table.get("url"), str):
        raise ConfigError(f"{item!r} names no store", hint='write a path, a URL, or a table with url = "…"')
    settings: dict[str, Any] = {"keep_last": keep_last}
    given: Mapping[str, Any] = table.get("options", {})
    _require(isinstance(given, Mapping), "options of a store must be a table", 'like options = {region = "eu-west-1"}')
    options = dict(given)
    for key, value in table.items():
        if key == "options":
            continue
        if key in _WRITTEN:
            name, read = _written(key, value)
            settings[name] = read
        elif key in _SHAPES:
            shape, fits = _SHAPES[key]
            _require(fits(value), f"{key} of a store must be {shape}, not {value!r}", "like keep_last = 5")
            settings[key] = value
        else:
            options[key] = value
    return StoreConfig(**settings, options=options)


def _written(key: str, value: object) -> tuple[str, Any]:
    """Return the name and value of a setting that people write with its unit."""
    text = str(value)
    if key == "keep_every" and (steps := _STEPS.fullmatch(text)) is not None:
        return "keep_every_steps", int(steps[1])
    return _WRITTEN[key][0], _WRITTEN[key][1](text, key)


def _rate(text: str, what: str) -> int:
    return parse_size(text.strip().removesuffix("/s"), what)


def _require(holds: bool, message: str, hint: str) -> None:
    if not holds:
        raise ConfigError(message, hint=hint)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_seconds(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


_WRITTEN: Mapping[str, tuple[str, Callable[[str, str], Any]]] = {
    "keep_every": ("keep_every_s", parse_duration),
    "every": ("every_s", parse_duration),
    "max": ("max_bytes", parse_size),
    "upload_max": ("upload_max_bytes_per_s", _rate),
}
_SHAPES: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "url": ("text", lambda value: isinstance(value, str)),
    "keep_last": ("a whole number", _is_whole),
    "keep_every_s": ("a number of seconds", _is_seconds),
    "keep_every_steps": ("a whole number", _is_whole),
    "keep_best": ("text", lambda value: isinstance(value, str)),
    "keep_tagged": ("true or false", lambda value: isinstance(value, bool)),
    "max_bytes": ("a whole number of bytes", _is_whole),
    "every_s": ("a number of seconds", _is_seconds),
    "backlog": ("a whole number", _is_whole),
    "upload_max_bytes_per_s": ("a whole number of bytes", _is_whole),
}
