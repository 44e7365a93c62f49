"""The messages between agent, ranks, launcher and `ckptctl`: few, typed and versioned.

Each message is a frozen record with scalar, list and dict fields; on the wire it is its fields plus `"type"`.
`parse` checks names and types of every field, so the code behind it never meets a missing key. A peer of another
`PROTOCOL_VERSION` is refused in its first message with words that say which side is older.

The records are not `dataclasses`: importing that module and generating code for thirty classes costs 50 ms, and
every rank would pay it. `Message` does the little that is needed in plain Python.
"""

from __future__ import annotations

import functools
import types
import typing
from typing import Any

from ckptd.errors import ProtocolError

PROTOCOL_VERSION = 1


@typing.dataclass_transform(frozen_default=True, eq_default=True)
class Message:  # noqa: PLW1641 - unhashable on purpose: fields may be lists and dicts
    """Base of all messages: fields from the annotations, frozen, compared and printed by value."""

    _fields: typing.ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls._fields = tuple(cls.__annotations__)
        _BY_TYPE[cls.__name__.lower()] = cls

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        fields = self._fields
        if len(args) > len(fields):
            raise TypeError(f"{type(self).__name__} takes {len(fields)} fields, {len(args)} were given")
        values = dict(zip(fields, args, strict=False))
        for name in fields[len(args) :]:
            if name in kwargs:
                values[name] = kwargs.pop(name)
            elif hasattr(type(self), name):
                default = getattr(type(self), name)
                values[name] = dict(default) if isinstance(default, dict) else default
            else:
                raise TypeError(f"field {name!r} is missing")
        if kwargs:
            raise TypeError(f"{type(self).__name__} has no field {next(iter(kwargs))!r}")
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a message is immutable: {type(self).__name__}.{name}")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"{type(self).__name__}({inner})"


_BY_TYPE: dict[str, type[Message]] = {}


class Hello(Message):
    """First message of every connection: who speaks, in which version. `role` is "rank" or "ctl"."""

    role: str
    pid: int
    version: int = PROTOCOL_VERSION


class Welcome(Message):
    """The agent's answer to `Hello`.

    `frameworks` lists the adapters that its plugins registered, as {"name", "trigger", "target"}: a rank that has
    imported `trigger` uses the object at `target` ("module:attribute") to capture and restore.
    """

    agent_pid: int
    frameworks: list[dict[str, str]]
    version: int = PROTOCOL_VERSION


class Refused(Message):
    """A request that can't be done; `error` is `CkptdError.to_json()`."""

    error: dict[str, Any]


class Done(Message):
    """A request that was done; `result` is what the verb returns."""

    result: dict[str, Any] = {}  # noqa: RUF012 - copied for each instance


# --- rank → agent ---------------------------------------------------------------------------------------------


class Join(Message):
    """A rank takes its place in the job. `generation` is what its launcher was told, 0 when nobody told it."""

    job: str
    rank: int
    world_size: int
    generation: int
    options: dict[str, Any] = {}  # noqa: RUF012 - copied for each instance


class Reserve(Message):
    """A rank asks for slots that can hold `image_bytes`, because its layout is new or has grown."""

    image_bytes: int


class Open(Message):
    """A rank asks for descriptors of the offered checkpoint's `files`, named as in its manifest; at most 64."""

    files: list[str]


class Restored(Message):
    """A rank has put the offered snapshot into its objects."""

    generation: int
    step: int
    seconds: float


class RestoreFailed(Message):
    """A rank could not use the offered snapshot; it ends with this error."""

    generation: int
    step: int
    error: dict[str, Any]


class Stepped(Message):
    """A rank has finished its first step since it joined; `at_s` is the monotonic clock, shared by the node."""

    step: int
    at_s: float


class Seal(Message):
    """A rank has written a complete shard image of `step` into `slot`; it won't touch that slot until released.

    The image describes itself (a safetensors header), so the tensor table needs no message. `witness` are digests of
    a few replicated tensors by name, which have to be the same on all ranks.
    """

    step: int
    slot: int
    image_bytes: int
    seconds: float
    values: dict[str, float] = {}  # noqa: RUF012 - copied for each instance
    final: bool = False
    witness: dict[str, str] = {}  # noqa: RUF012 - copied for each instance


class Missed(Message):
    """A rank saw the announced step too late, or could not capture it; `error` says why when it was a fault."""

    step: int
    at_step: int
    error: dict[str, Any] | None = None


class Request(Message):
    """A rank asks for a checkpoint at the next boundary that all ranks can meet."""

    at_step: int


class Leave(Message):
    """A rank has left its training block. The answer comes when nothing of it waits to be committed."""

    step: int


class Raised(Message):
    """A rank ends with an uncaught exception."""

    job: str
    rank: int
    generation: int
    exception: dict[str, Any]


# --- agent → rank ---------------------------------------------------------------------------------------------


class Admitted(Message):
    """A place in the job; its control page comes along.

    `offer` is None for a fresh start, else {"generation", "step", "tier", "in_memory"}; then a second descriptor holds
    the manifest of what is offered (`ckptd.storage.manifest`), whose files the rank may `Open`.
    """

    generation: int
    offer: dict[str, Any] | None = None


class Opened(Message):
    """The files that a rank asked for, one descriptor each in the same order."""

    files: list[str]


class Lent(Message):
    """The rank's slots, one descriptor each in the order of `slots`; slots lent earlier and not listed are gone."""

    slots: list[int]
    size_bytes: int


# --- ckptctl → agent ------------------------------------------------------------------------------------------


class Submit(Message):
    """Start a job; `config` is `JobConfig.to_json()`."""

    config: dict[str, Any]


class Status(Message):
    """Ask for the live state of one job, or of all of them."""

    job: str | None = None


class Control(Message):
    """Ask a job to do something: `verb` is "checkpoint", "stop" or "restart".

    A restart with `step` begins with the newest checkpoint that is no newer.
    """

    job: str
    verb: str
    wait: bool = True
    step: int | None = None


# --- agent ↔ launcher -----------------------------------------------------------------------------------------


class Ready(Message):
    """The launcher has imported its preload list in `seconds`; `skipped` maps module names to reasons."""

    seconds: float
    preloaded: list[str]
    skipped: dict[str, str]
    version: int = PROTOCOL_VERSION


class Spawn(Message):
    """Start one rank: `env` is added to the launcher's environment, output goes to the two files."""

    rank: int
    env: dict[str, str]
    stdout: str
    stderr: str


class Spawned(Message):
    """A rank's process exists."""

    rank: int
    pid: int
    at_s: float


class SpawnFailed(Message):
    """A rank's process could not be started."""

    rank: int
    error: dict[str, Any]


class Kill(Message):
    """Send `signal` to every rank's process group. What else descends from ranks ends with the last of them."""

    signal: int


class Exited(Message):
    """A rank's process has ended and was reaped; `returncode` as `subprocess` has it."""

    rank: int
    pid: int
    returncode: int
    at_s: float


def to_frame(message: Message) -> dict[str, Any]:
    """Return the JSON object of a message."""
    return {"type": type(message).__name__.lower(), **message.__dict__}


def parse(frame: dict[str, Any]) -> Message:
    """Return the message of a JSON object; raises `ProtocolError` that names what does not fit."""
    name = frame.get("type")
    kind = _BY_TYPE.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ProtocolError(f"a peer sent a message of unknown type {name!r}")
    spec = _spec(kind.__name__.lower())
    # A greeting of another version is read as far as we know it, so that the answer can say which side is older.
    foreign = kind in {Hello, Welcome} and frame.get("version", PROTOCOL_VERSION) != PROTOCOL_VERSION
    values: dict[str, Any] = {}
    for key, value in frame.items():
        if key == "type":
            continue
        if key not in spec and foreign:
            continue
        if key not in spec:
            raise ProtocolError(f"message {name!r} has no field {key!r}")
        if not _fits(value, spec[key]):
            raise ProtocolError(f"field {key!r} of message {name!r} is not of type {spec[key]}")
        values[key] = value
    try:
        return kind(**values)
    except TypeError as error:
        raise ProtocolError(f"message {name!r} is incomplete: {error}") from error


def check_version(theirs: int, peer: str) -> None:
    """Refuse a peer of another protocol version, saying which side is older."""
    if theirs != PROTOCOL_VERSION:
        older = peer if theirs < PROTOCOL_VERSION else "this side"
        raise ProtocolError(
            f"{peer} speaks protocol version {theirs}, this side {PROTOCOL_VERSION}",
            hint=f"{older} is older: install one version of ckptd on both sides",
        )


@functools.cache
def _spec(name: str) -> dict[str, Any]:
    kind = _BY_TYPE[name]
    hints = typing.get_type_hints(kind)
    return {field: hints[field] for field in kind._fields}


def _fits(value: object, wanted: Any) -> bool:
    origin = typing.get_origin(wanted)
    if origin is types.UnionType:
        return any(_fits(value, part) for part in typing.get_args(wanted))
    if wanted is Any:
        return True
    if wanted is types.NoneType:
        return value is None
    if origin is list:
        (item,) = typing.get_args(wanted)
        return isinstance(value, list) and all(_fits(part, item) for part in value)
    if origin is dict:
        _, item = typing.get_args(wanted)
        return isinstance(value, dict) and all(_fits(part, item) for part in value.values())
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int:  # none is larger than a word of the control page
        return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64
    return isinstance(value, wanted)
