"""Settings: flags, `CKPTD_*` variables and TOML files become validated values here, and nowhere else."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptd.core.policy.numbers import NumbersPolicy
from ckptd.errors import ConfigError
from ckptd.halt_config import HaltConfig, read_halt
from ckptd.numbers_config import read_numbers
from ckptd.places import absolute_store
from ckptd.protocol import endpoint
from ckptd.storage.keys import check_job
from ckptd.store_config import DEFAULT_KEEP_LAST, StoreConfig, absolute_stores, read_stores, split_place
from ckptd.units import parse_duration, parse_size
from ckptd.watch_config import HangConfig, StragglerConfig, read_hang, read_straggler

DEFAULT_PRELOAD = ("torch",)
MAX_NPROC = 1024
OVERLAPS = ("auto", "on", "off")
AGENT_LOSSES = ("keep", "end")
_EXAMPLE = 'a job looks like: command = ["train.py", "--steps", "10"], store = "runs", nproc = 2, every = "30s"'
_ORIGIN_EXAMPLE = "write PLACE/JOB, like s3://bucket/runs/gpt or ./runs/gpt"


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Where an agent keeps its state and listens; `memory_max_bytes` bounds all slots together, 0: the machine does."""

    home: Path
    socket: Path
    memory_max_bytes: int = 0
    blocked_plugins: tuple[str, ...] = ()
    log_format: str = "auto"

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> AgentConfig:
        """Read `CKPTD_HOME`, `CKPTD_SOCKET`, `CKPTD_MEMORY_MAX`, `CKPTD_PLUGINS_BLOCK` and `CKPTD_LOG_FORMAT`."""
        log_format = environ.get("CKPTD_LOG_FORMAT", "auto")
        if log_format not in ("auto", "console", "json"):
            raise ConfigError(f"CKPTD_LOG_FORMAT {log_format!r} is unknown", hint="use auto, console or json")
        return cls(
            home=Path(endpoint.home(environ)),
            socket=Path(endpoint.socket_path(environ)),
            memory_max_bytes=parse_size(environ.get("CKPTD_MEMORY_MAX", "0"), "CKPTD_MEMORY_MAX"),
            blocked_plugins=tuple(filter(None, map(str.strip, environ.get("CKPTD_PLUGINS_BLOCK", "").split(",")))),
            log_format=log_format,
        )


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose checkpoint a job begins with that has none of its own: a job, which may be anybody's, in its place."""

    place: str
    job: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """For the plugin that opens the place."""

    def __post_init__(self) -> None:
        """Refuse what names no job."""
        check_job(self.job)

    @property
    def url(self) -> str:
        """Place and job in one, as `ckptctl ls` takes them."""
        return f"{self.place.rstrip('/')}/{self.job}"

    def to_json(self) -> dict[str, Any]:
        """Return the form that crosses the socket and stands in the journal."""
        return {"url": self.url, "options": dict(self.options)}


@dataclass(frozen=True, slots=True)
class JobConfig:
    """Everything that says how a job runs. `command` is empty for a job whose ranks somebody else starts."""

    name: str
    command: tuple[str, ...]
    stores: tuple[StoreConfig, ...]
    """The tiers, fastest first."""
    nproc: int = 1
    every_s: float = 30.0
    max_restarts: int = 100
    restart_window_s: float = 86400.0
    """How long a restart counts against `max_restarts`."""
    preload: tuple[str, ...] = DEFAULT_PRELOAD
    """Modules that the launcher imports before it forks; none: every rank is started by plain exec."""
    python: str = sys.executable
    cwd: str = "."
    env: Mapping[str, str] = field(default_factory=dict)
    slots: int = 2
    """How many snapshots memory holds: two, so that one is always sealed. With one, that is given up for the next."""
    reuse_unchanged: bool = True
    """Whether a tensor that has not changed is referred to, and not written again; else every file is complete."""
    flush_max_bytes_per_s: int = 0
    """What flushes may write in a second, 0: as much as the disk takes."""
    overlap: str = "auto"
    """Whether captures are copied beside the next step: "on", "off", or "auto" for what costs the job less."""
    resume_from: Origin | None = None
    """What it begins with when its own stores hold no checkpoint of it."""
    resume_step: int | None = None
    """Which step of that; None for the newest."""
    on_agent_loss: str | None = None
    """Whether launcher and ranks "keep" training for the next agent when theirs dies, or "end".

    None: as the agent has it, which is to keep for a service, and else to end.
    """
    check_wait_s: float = 300.0
    """How long a start waits for its node to be fit before the job is given up."""
    agent_wait_s: float = 600.0
    """How long they go on without one."""
    chaos: bool = False
    """Whether `ckptctl chaos` may do it harm."""
    hang: HangConfig | None = field(default_factory=HangConfig)
    """How long a rank may go without a sign of life; None: as long as it likes."""
    straggler: StragglerConfig = field(default_factory=StragglerConfig)
    numbers: NumbersPolicy = field(default_factory=NumbersPolicy)
    """What is made of the numbers that ranks report."""
    halt: HaltConfig = field(default_factory=HaltConfig)
    """When it stops by itself, and how long a stop may take."""

    def __post_init__(self) -> None:
        """Refuse what can't run, before anything is started."""
        check_job(self.name)
        _require(1 <= self.nproc <= MAX_NPROC, f"nproc is {self.nproc}", f"it must be from 1 to {MAX_NPROC}")
        _require(0 < self.every_s < math.inf, f"every is {self.every_s:g} s", "it must be longer than nothing")
        _require(self.max_restarts >= 0, f"max_restarts is {self.max_restarts}", "0 means that no restart is made")
        _require(self.restart_window_s > 0, f"restart_window is {self.restart_window_s:g} s", 'write it like "24h"')
        _require(1 <= self.slots <= 8, f"slots is {self.slots}", "from 1 to 8; 2 keep one sealed while one is written")
        _require(
            self.flush_max_bytes_per_s >= 0,
            f"flush_max is {self.flush_max_bytes_per_s} bytes per second",
            "0 means that flushes are not bounded",
        )
        known = (None, *AGENT_LOSSES)
        _require(self.on_agent_loss in known, f"on_agent_loss is {self.on_agent_loss!r}", "use keep or end")
        _require(0 < self.check_wait_s < math.inf, f"check_wait is {self.check_wait_s:g} s", 'write it like "5m"')
        _require(0 < self.agent_wait_s < math.inf, f"agent_wait is {self.agent_wait_s:g} s", 'write it like "10m"')
        _require(self.overlap in OVERLAPS, f"overlap is {self.overlap!r}", f"use {', '.join(OVERLAPS[:-1])} or off")
        _require(bool(self.stores), "no store is named", "say where checkpoints go, like --store ./runs")
        step = self.resume_step
        _require(step is None or step >= 1, f"resume_step is {step}", "steps are counted from 1, as `ckptctl ls` says")
        _require(
            step is None or self.resume_from is not None,
            f"resume_step is {step}, and no job to resume from is named",
            f"add resume_from: {_ORIGIN_EXAMPLE}",
        )

    @property
    def supervised(self) -> bool:
        """Whether the agent starts the ranks itself."""
        return bool(self.command)

    def to_json(self) -> dict[str, Any]:
        """Return the form that crosses the socket and stands in the journal."""
        data = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        data["store"] = [store.to_json() for store in data.pop("stores")]
        data["env"] = dict(self.env)
        data["hang"] = False if self.hang is None else self.hang.to_json()
        data["straggler"] = self.straggler.to_json()
        data["numbers"] = dataclasses.asdict(self.numbers)
        data["halt"] = self.halt.to_json()
        if self.resume_from is not None:
            data["resume_from"] = self.resume_from.to_json()
        return {key: value for key, value in data.items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> JobConfig:
        """Rebuild what `to_json` wrote; raises `ConfigError` that names the field that does not fit."""
        for key, value in data.items():
            _require(key in _SHAPES, f"a job has no setting {key!r}", f"known are {_keys()}")
            shape, fits = _SHAPES[key]
            _require(fits(value), f"{key} must be {shape}, not {value!r}", _EXAMPLE)
            _require(_is_passable(value), f"{key} has text that no path or process can have", _EXAMPLE)
        for key in ("name", "command", "store"):
            _require(key in data, f"the job's settings lack {key!r}", _EXAMPLE)
        values: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in data.items()}
        values["stores"] = read_stores(values.pop("store"), values.pop("keep_last", DEFAULT_KEEP_LAST))
        for key, read in _READERS.items():
            if key in values:
                values[key] = read(values[key])
        return cls(**values)


def load_job_file(path: Path) -> JobConfig:
    """Read a job from a TOML file; its relative paths are seen from the file's folder."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}", hint="name a job file, like job.toml") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", hint=_EXAMPLE) from error
    data.setdefault("name", path.stem)
    if "every" in data:
        data["every_s"] = parse_duration(str(data.pop("every")), "every")
    for key in ("agent_wait", "check_wait"):
        if key in data:
            data[f"{key}_s"] = parse_duration(str(data.pop(key)), key)
    if "restart_window" in data:
        data["restart_window_s"] = parse_duration(str(data.pop("restart_window")), "restart_window")
    if "flush_max" in data:
        data["flush_max_bytes_per_s"] = parse_rate(str(data.pop("flush_max")), "flush_max")
    if data.get("preload") is False:
        data["preload"] = []
    folder = path.absolute().parent
    cwd = data.setdefault("cwd", ".")
    if isinstance(cwd, str):
        data["cwd"] = str(folder / cwd)
    _require(
        bool(data.get("command")), f"{path} names no command", 'write it like command = ["train.py", "--steps", "10"]'
    )
    return absolute_job(JobConfig.from_json(data), folder)


def read_origin(value: object) -> Origin:
    """Return the job to resume from that a flag, JSON or TOML names: "PLACE/JOB", or a table with that as its url.

    Raises `ConfigError` that says what does not fit.
    """
    try:
        (store,) = read_stores(value, DEFAULT_KEEP_LAST)
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{value!r} names no job to resume from", hint=_ORIGIN_EXAMPLE) from error
    for item in dataclasses.fields(store):
        is_known = item.name in ("url", "options") or getattr(store, item.name) == item.default
        _require(is_known, f"resume_from has no setting {item.name}", f"it is only read: {_ORIGIN_EXAMPLE}")
    place, job = split_place(store.url)
    return Origin(place, job, store.options)


def absolute_job(config: JobConfig, folder: Path) -> JobConfig:
    """Return the same job with its places as they are seen from everywhere; paths in it are seen from `folder`."""
    origin = config.resume_from
    if origin is not None:
        origin = dataclasses.replace(origin, place=absolute_store(origin.place, folder))
    return dataclasses.replace(config, stores=absolute_stores(config.stores, folder), resume_from=origin)


def parse_rate(text: str, what: str) -> int:
    """Return the bytes per second of "500MB/s" or "500MB"; raises `ConfigError` that names `what`."""
    return parse_size(text.strip().removesuffix("/s"), what)


def _keys() -> str:
    """Return the keys of a job file; what is kept in seconds or bytes is written without that."""
    return ", ".join(key.removesuffix("_bytes_per_s").removesuffix("_s") for key in _SHAPES)


def _require(holds: bool, message: str, hint: str) -> None:
    if not holds:
        raise ConfigError(message, hint=hint)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_store(value: object) -> bool:
    return isinstance(value, (str, list, tuple, dict))


def _is_origin(value: object) -> bool:
    return isinstance(value, (str, dict))


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict)


def _is_hang(value: object) -> bool:
    return value is False or isinstance(value, (str, dict))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair)


def _is_environment(value: object) -> bool:
    return _is_table(value) and isinstance(value, dict) and all(name and "=" not in name for name in value)


def _is_passable(value: object, levels: int = 16) -> bool:
    """Return whether the kernel takes all text of a setting, as a path or to start a process with.

    Nothing that is meant is nested in so many `levels`.
    """
    if isinstance(value, str):
        try:
            return b"\0" not in os.fsencode(value)
        except UnicodeEncodeError:
            return False
    if isinstance(value, Mapping):
        return levels > 0 and all(_is_passable(item, levels - 1) for pair in value.items() for item in pair)
    if isinstance(value, (list, tuple)):
        return levels > 0 and all(_is_passable(item, levels - 1) for item in value)
    return True


_SHAPES: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "name": ("text", _is_text),
    "command": ("a list of strings", _is_list),
    "store": ("a path, a URL, a table, or a list of them", _is_store),
    "nproc": ("a whole number", _is_whole),
    "every_s": ("a number of seconds", _is_number),
    "keep_last": ("a whole number", _is_whole),
    "max_restarts": ("a whole number", _is_whole),
    "restart_window_s": ("a number of seconds", _is_number),
    "preload": ("a list of strings", _is_list),
    "python": ("text", _is_text),
    "cwd": ("text", _is_text),
    "env": ("a table of strings, whose names have no =", _is_environment),
    "slots": ("a whole number", _is_whole),
    "reuse_unchanged": ("true or false", _is_switch),
    "flush_max_bytes_per_s": ("a whole number", _is_whole),
    "overlap": ("text", _is_text),
    "resume_from": ("PLACE/JOB, or a table with that as its url", _is_origin),
    "resume_step": ("a whole number", _is_whole),
    "on_agent_loss": ("text", _is_text),
    "agent_wait_s": ("a number of seconds", _is_number),
    "check_wait_s": ("a number of seconds", _is_number),
    "chaos": ("true or false", _is_switch),
    "hang": ("a table, or false", _is_hang),
    "straggler": ("a table", _is_mapping),
    "numbers": ("text or a table", _is_origin),
    "halt": ("a table", _is_mapping),
}
"""What each setting of a job looks like in JSON and TOML."""
_READERS: Mapping[str, Callable[[Any], Any]] = {
    "resume_from": read_origin, "hang": read_hang, "straggler": read_straggler, "numbers": read_numbers,
    "halt": read_halt,
}  # fmt: skip
"""What makes a value of those settings that are more than one."""
