"""Pickles read as data: objects become a name and what they were made from, and nothing is imported, made or called.

The metadata of a DCP folder is a pickle of a newer protocol than torch's own safe loader reads.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from ckptd.errors import DamagedError
from ckptd.storage.safetensors_files import IN_PART

_MARK: Any = object()


class Global:
    """A name in a module."""

    def __init__(self, name: str) -> None:
        self.name = name


class Made:
    """What calling something with arguments would have made, and the state that it was given."""

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None


def read(file: BinaryIO, where: str) -> Any:
    """Return what a pickle holds; raises `DamagedError` for what is no pickle, or one of an unusual kind."""
    reader = _Reader()
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return reader.stack[-1]
            _STEPS[opcode.name](reader, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{where} can't be read: {type(error).__name__}: {error}", hint=IN_PART) from error
    raise DamagedError(f"{where} ends too early", hint=IN_PART)


class _Reader:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        at = max(index for index, item in enumerate(self.stack) if item is _MARK)
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items


def _push(make: Callable[[], Any]) -> Callable[[_Reader, Any], None]:
    return lambda reader, _: reader.stack.append(make())


def _value(reader: _Reader, argument: Any) -> None:
    reader.stack.append(argument)


def _tuple_of(count: int) -> Callable[[_Reader, Any], None]:
    def step(reader: _Reader, _: Any) -> None:
        items = tuple(reader.stack[-count:])
        del reader.stack[-count:]
        reader.stack.append(items)

    return step


def _made(reader: _Reader, _: Any) -> None:
    arguments, function = reader.pop(), reader.pop()
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise TypeError("something is made of what is no class")
    reader.stack.append(Made(function.name, arguments))


def _state(reader: _Reader, _: Any) -> None:
    state, target = reader.pop(), reader.stack[-1]
    if not isinstance(target, Made):
        raise TypeError("a state is given to what is no object")
    target.state = state


def _stack_global(reader: _Reader, _: Any) -> None:
    name, module = reader.pop(), reader.pop()
    reader.stack.append(Global(f"{module}.{name}"))


def _put(reader: _Reader, number: Any) -> None:
    reader.memo[len(reader.memo) if number is None else number] = reader.stack[-1]


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


def _set_items(reader: _Reader, items: list[Any]) -> None:
    reader.stack[-1].update(_pairs(items))


def _set_item(reader: _Reader, _: Any) -> None:
    value, key = reader.pop(), reader.pop()
    _set_items(reader, [key, value])


def _append(reader: _Reader, _: Any) -> None:
    item = reader.pop()
    reader.stack[-1].append(item)


_STEPS: Mapping[str, Callable[[_Reader, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda _reader, _argument: None),
    **dict.fromkeys(
        (
            "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "SHORT_BINUNICODE",
            "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
        ),
        _value,
    ),
    "NONE": _push(lambda: None),
    "NEWTRUE": _push(lambda: True),
    "NEWFALSE": _push(lambda: False),
    "EMPTY_TUPLE": _push(tuple),
    "EMPTY_LIST": _push(list),
    "EMPTY_DICT": _push(dict),
    "MARK": _push(lambda: _MARK),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": lambda reader, _: reader.stack.append(tuple(reader.since_mark())),
    "APPEND": _append,
    "APPENDS": lambda reader, _: (items := reader.since_mark(), reader.stack[-1].extend(items))[1],
    "SETITEM": _set_item,
    "SETITEMS": lambda reader, _: _set_items(reader, reader.since_mark()),
    "GLOBAL": lambda reader, name: reader.stack.append(Global(name.replace(" ", "."))),
    "STACK_GLOBAL": _stack_global,
    "NEWOBJ": _made,
    "REDUCE": _made,
    "BUILD": _state,
    "MEMOIZE": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "BINGET": lambda reader, number: reader.stack.append(reader.memo[number]),
    "LONG_BINGET": lambda reader, number: reader.stack.append(reader.memo[number]),
    "POP": lambda reader, _: reader.stack.pop(),
}  # fmt: skip
"""What each opcode does that such pickles are made of; any other is refused."""
