"""What a message is: a frozen record that is checked field by field on its way in. Which there are is in `messages`.

The records are not `dataclasses`: importing that module and generating code for thirty classes costs 50 ms, and
every rank would pay it. `Message` does the little that is needed in plain Python.
"""

from __future__ import annotations

import functools
import types
import typing
from typing import Any

from ckptd.errors import ProtocolError

PROTOCOL_VERSION = 2


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
_GREETINGS = ("hello", "welcome")


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
    foreign = name in _GREETINGS and frame.get("version", PROTOCOL_VERSION) != PROTOCOL_VERSION
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
