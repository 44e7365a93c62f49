"""Where a job's checkpoints go and what stays there: a `StoreConfig` for each tier, as flags and TOML files say it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptd.errors import ConfigError
from ckptd.places import absolute_store, disks_of
from ckptd.units import parse_duration, parse_size

DEFAULT_KEEP_LAST = 3
DEFAULT_SCRUB_BYTES_PER_S = 20 * 10**6
_BEST = re.compile(r"(?P<metric>[^:\s]+):(?P<mode>min|max):(?P<count>[1-9]\d{0,5})")
_STEPS = re.compile(r"\s*([1-9]\d{0,17})\s*steps?\s*")


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """One tier of a job: its place, what retention keeps there, and how much goes there."""

    url: str
    """A folder, a URL, or the folders of several disks with commas between them."""
    keep_last: int = DEFAULT_KEEP_LAST
    keep_every_s: float = 0.0
    keep_every_steps: int = 0
    keep_best: str = ""
    """`metric:min:count` or `metric:max:count`."""
    keep_tagged: bool = True
    max_bytes: int = 0
    """What all checkpoints may take there; 0: no bound."""
    grace_s: float = 0.0
    """For how long a removal can be undone; 0: what is removed is gone at once."""
    garbage_after_s: float = 86400.0
    """Where other processes can't be kept out, how old a left-over must be that nobody has committed."""
    every_s: float = 0.0
    """No more than one checkpoint in so many seconds is uploaded; 0: as many as get through. Not for the first tier."""
    backlog: int = 2
    """How many checkpoints may wait for their upload."""
    upload_max_bytes_per_s: int = 0
    """What uploads may send in a second; 0: as much as gets through."""
    scrub_s: float | None = None
    """So long after its commit, and after each time it was read, a copy is read again.

    0: only when somebody has found it damaged. None: after a day where reading costs nothing, as 0 behind a network.
    """
    scrub_max_bytes_per_s: int = DEFAULT_SCRUB_BYTES_PER_S
    """What a scrub may read in a second, and what it mends may write; 0: as much as gets through."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """For the plugin that opens it, which refuses what it does not know."""

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        _require(bool(self.url), "no store is named", "say where checkpoints go, like --store ./runs")
        disks_of(self.url)
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
    return _each_alone(stores)


def absolute_stores(stores: tuple[StoreConfig, ...], folder: Path) -> tuple[StoreConfig, ...]:
    """Return the same stores as they are seen from everywhere."""
    return _each_alone(tuple(dataclasses.replace(store, url=absolute_store(store.url, folder)) for store in stores))


def _each_alone(stores: tuple[StoreConfig, ...]) -> tuple[StoreConfig, ...]:
    """Return stores of which no two have a place in common."""
    places = [place for store in stores for place in disks_of(store.url)]
    for place in places:
        _require(places.count(place) == 1, f"store {place} is named twice", "each tier is a place of its own")
    return stores


def split_place(text: str) -> tuple[str, str]:
    """Return place and job of what names both, like ``s3://bucket/runs/gpt``; raises `ConfigError` when it does not."""
    place, _, job = text.rstrip("/").rpartition("/")
    if not job or not place.rstrip("/") or place.rstrip("/").endswith(":"):
        raise ConfigError(f"{text!r} names no job in a place", hint="write PLACE/JOB, like s3://bucket/runs/gpt")
    return place, job


def _read_store(item: object, keep_last: int) -> StoreConfig:
    if isinstance(item, StoreConfig):
        return item
    table = {"url": item} if isinstance(item, str) else _with_url(item)
    if not isinstance(table, Mapping) or not isinstance(table.get("url"), str):
        raise ConfigError(f"{item!r} names no store", hint='write a path, a URL, or a table with url = "…" or disks')
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


def _with_url(item: object) -> object:
    """Return a table that names disks as one with their URL."""
    if not isinstance(item, Mapping) or "disks" not in item:
        return item
    table = dict(item)
    disks = table.pop("disks")
    _require("url" not in table, "a store has both url and disks", "each store is one or the other")
    _require(
        isinstance(disks, (list, tuple)) and bool(disks) and all(isinstance(disk, str) for disk in disks),
        f"disks of a store must be a list of folders, not {disks!r}",
        'like disks = ["/nvme0/runs", "/nvme1/runs"]',
    )
    for disk in disks:
        _require("://" not in disk, f"disk {disk!r} of a store is a URL", "disks are folders of this node")
        _require("," not in disk, f"disk {disk!r} has a comma in its name", "use a folder or a mount without one")
    return {**table, "url": ",".join(disks)}


def _written(key: str, value: object) -> tuple[str, Any]:
    """Return the name and value of a setting that people write with its unit."""
    text = str(value)
    if key == "keep_every" and (steps := _STEPS.fullmatch(text)) is not None:
        return "keep_every_steps", int(steps[1])
    return _WRITTEN[key][0], _WRITTEN[key][1](text, key)


def _interval(text: str, what: str) -> float:
    return 0.0 if text.strip() == "0" else parse_duration(text, what)


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
    "grace": ("grace_s", _interval),
    "garbage_after": ("garbage_after_s", parse_duration),
    "every": ("every_s", parse_duration),
    "max": ("max_bytes", parse_size),
    "upload_max": ("upload_max_bytes_per_s", _rate),
    "scrub": ("scrub_s", _interval),
    "scrub_max": ("scrub_max_bytes_per_s", _rate),
}
_SHAPES: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "url": ("text", lambda value: isinstance(value, str)),
    "keep_last": ("a whole number", _is_whole),
    "keep_every_s": ("a number of seconds", _is_seconds),
    "keep_every_steps": ("a whole number", _is_whole),
    "keep_best": ("text", lambda value: isinstance(value, str)),
    "keep_tagged": ("true or false", lambda value: isinstance(value, bool)),
    "max_bytes": ("a whole number of bytes", _is_whole),
    "grace_s": ("a number of seconds", _is_seconds),
    "garbage_after_s": ("a number of seconds", _is_seconds),
    "every_s": ("a number of seconds", _is_seconds),
    "backlog": ("a whole number", _is_whole),
    "upload_max_bytes_per_s": ("a whole number of bytes", _is_whole),
    "scrub_s": ("a number of seconds", lambda value: value is None or _is_seconds(value)),
    "scrub_max_bytes_per_s": ("a whole number of bytes", _is_whole),
}
