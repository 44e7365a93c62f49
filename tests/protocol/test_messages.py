"""Messages: every type crosses the wire unchanged, and what is not a message is refused by name."""

from __future__ import annotations

import types
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import ProtocolError
from ckptd.protocol import messages
from ckptd.protocol.codec import Decoder, encode
from ckptd.protocol.messages import (
    PROTOCOL_VERSION,
    Done,
    Hello,
    Message,
    Seal,
    Welcome,
    check_version,
    parse,
    to_frame,
)

KINDS = sorted(
    (
        kind
        for kind in vars(messages).values()
        if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
    ),
    key=lambda kind: kind.__name__,
)
_ANY = st.none() | st.booleans() | st.integers() | st.text(max_size=10) | st.lists(st.integers(), max_size=3)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """A strategy for the values of an annotation."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return st.one_of([values_of(part) for part in inner])
    if origin is list:
        return st.lists(values_of(inner[0]), max_size=4)
    if origin is dict:
        return st.dictionaries(st.text(max_size=6), values_of(inner[1]), max_size=4)
    simple = {
        str: st.text(max_size=20),
        int: st.integers(-(2**63), 2**64 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        types.NoneType: st.none(),
        Any: _ANY,
    }
    return simple[hint]


def any_of(kind: type[Message]) -> st.SearchStrategy[Message]:
    """A strategy for messages of a kind."""
    hints = typing.get_type_hints(kind)
    return st.fixed_dictionaries({name: values_of(hints[name]) for name in kind._fields}).map(lambda v: kind(**v))


def sample(kind: type[Message]) -> Message:
    """One message of a kind, with every field given."""
    hints = typing.get_type_hints(kind)
    simple = {str: "text", int: 7, float: 0.5, bool: True}
    made: dict[str, Any] = {}
    for name in kind._fields:
        hint = hints[name]
        parts = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
        first = typing.get_origin(parts[0]) or parts[0]
        made[name] = simple[first] if first in simple else first()
    return kind(**made)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_type_round_trips(kind: type[Message]) -> None:
    """Any message of any type is the same after encoding, any wire, decoding and parsing."""

    @settings(max_examples=15, deadline=None)
    @given(any_of(kind))
    def check(message: Message) -> None:
        (frame,) = Decoder().feed(encode(to_frame(message)))
        assert parse(frame) == message
        assert type(parse(frame)) is kind

    check()


def test_type_names_are_unique() -> None:
    """No two messages share their name on the wire, and no field is called like the type."""
    names = [to_frame(sample(kind))["type"] for kind in KINDS]
    assert len(set(names)) == len(KINDS)
    assert all("type" not in kind._fields for kind in KINDS)


def test_a_message_is_immutable_and_compared_by_value() -> None:
    """Two messages with the same fields are equal, of another type they are not, and none can be changed."""
    assert Done({"a": 1}) == Done({"a": 1}) != Done({"a": 2})
    assert messages.Leave(3) != messages.Reserve(3)
    with pytest.raises(AttributeError, match="immutable"):
        messages.Leave(3).step = 4
    assert repr(messages.Leave(3)) == "Leave(step=3)"
    first, second = Done(), Done()
    first.result["a"] = 1
    assert second == Done({}), "two messages share their default"


def test_construction_checks_the_fields() -> None:
    """Too many, unknown or missing fields are a mistake of ours, and a `TypeError` names it."""
    with pytest.raises(TypeError, match="takes 1 fields, 2 were given"):
        messages.Leave(1, 2)
    with pytest.raises(TypeError, match="no field 'stap'"):
        messages.Leave(1, stap=2)
    with pytest.raises(TypeError, match="'step' is missing"):
        messages.Leave()


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nonsense", "", "message", "Hello", "HELLO", None, 7, ["hello"], {}])
def test_an_unknown_type_is_named(name: object) -> None:
    """A type that this version does not know is refused with its name."""
    with pytest.raises(ProtocolError) as caught:
        parse({"type": name})
    assert f"unknown type {name!r}" in caught.value.message


def test_a_frame_without_type_is_refused() -> None:
    """A frame that says nothing about its type is refused."""
    with pytest.raises(ProtocolError, match="unknown type None"):
        parse({"step": 3})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_unknown_field_is_named(kind: type[Message]) -> None:
    """A field that the message does not have is refused with both names."""
    frame = {**to_frame(sample(kind)), "surprise": 1}
    with pytest.raises(ProtocolError, match=f"message '{frame['type']}' has no field 'surprise'"):
        parse({**frame, **({"version": PROTOCOL_VERSION} if "version" in frame else {})})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_missing_field_is_named(kind: type[Message]) -> None:
    """Without a field that has no default, the message is refused with both names; defaults fill in the others."""
    whole = to_frame(sample(kind))
    for name in kind._fields:
        frame = {key: value for key, value in whole.items() if key != name}
        if hasattr(kind, name):
            assert getattr(parse(frame), name) == getattr(kind, name)
            continue
        with pytest.raises(ProtocolError, match=f"message '{whole['type']}' is incomplete.*'{name}'"):
            parse(frame)


_WRONG: dict[Any, list[Any]] = {
    str: [None, 1, 1.5, True, [], {}],
    int: [None, "1", 1.5, True, [], {}],
    float: [None, "1", True, [], {}],
    bool: [None, "true", 0, 1, 1.0, [], {}],
    list: [None, "text", 1, {}, {"a": 1}],
    dict: [None, "text", 1, [], [["a", 1]]],
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_field_of_another_type_is_named(kind: type[Message]) -> None:
    """A value that is not of the field's type is refused with both names; a bool is no number."""
    hints = typing.get_type_hints(kind)
    for name in kind._fields:
        parts = typing.get_args(hints[name]) if typing.get_origin(hints[name]) is types.UnionType else (hints[name],)
        bases = [typing.get_origin(part) or part for part in parts]
        wrong = [value for base in bases if base is not types.NoneType for value in _WRONG[base]]
        for value in wrong:
            if value is None and types.NoneType in bases:
                continue
            with pytest.raises(ProtocolError, match=f"field '{name}' of message '{kind.__name__.lower()}'"):
                parse({**to_frame(sample(kind)), name: value})


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [(Welcome, "frameworks", [{"name": 1}]), (Welcome, "frameworks", ["torch"]), (Seal, "values", {"loss": "low"}),
     (Seal, "witness", {"w": 1}), (messages.Open, "files", ["a", 1]), (messages.Opened, "files", "a"),
     (messages.Admitted, "offer", "g1/s5"),
     (messages.Lent, "slots", [1, "2"]), (messages.Spawn, "env", {"A": 1})],
)  # fmt: skip
def test_what_is_inside_is_checked(kind: type[Message], field: str, value: object) -> None:
    """Items of lists and dicts are checked like the fields themselves."""
    with pytest.raises(ProtocolError, match=f"field '{field}'"):
        parse({**to_frame(sample(kind)), field: value})


_JSON = st.recursive(
    _ANY, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner), max_leaves=5
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.data())
def test_random_frames_raise_only_protocol_errors(kind: type[Message], data: st.DataObject) -> None:
    """A frame with random fields is a message of its type, or a `ProtocolError`."""
    frame = dict(to_frame(sample(kind)))
    for name in data.draw(st.lists(st.sampled_from([*frame, "other"]), max_size=3)):
        if data.draw(st.booleans()):
            frame[name] = data.draw(_JSON)
        else:
            frame.pop(name, None)
    try:
        parse(frame)
    except ProtocolError:
        return
    assert frame["type"] == kind.__name__.lower() or frame["type"] in {other.__name__.lower() for other in KINDS}


# --- versions ---------------------------------------------------------------------------------------------------


def test_the_same_version_is_welcome() -> None:
    """Two sides of one version have nothing to say about it."""
    check_version(PROTOCOL_VERSION, "the agent")
    assert Hello("rank", 7).version == Welcome(7, []).version == PROTOCOL_VERSION


@pytest.mark.parametrize(
    ("theirs", "older"), [(PROTOCOL_VERSION - 1, "the agent"), (PROTOCOL_VERSION + 1, "this side")]
)
def test_a_mismatch_says_who_is_older(theirs: int, older: str) -> None:
    """The error names both versions, and its hint says which side to update."""
    with pytest.raises(ProtocolError, match=f"version {theirs}, this side {PROTOCOL_VERSION}") as caught:
        check_version(theirs, "the agent")
    assert (caught.value.hint or "").startswith(f"{older} is older")


@pytest.mark.parametrize("kind", [Hello, Welcome])
def test_a_greeting_of_another_version_can_be_read(kind: type[Hello | Welcome]) -> None:
    """A newer peer's greeting may have fields that we don't know: it must be read, to say that versions differ."""
    frame = {**to_frame(sample(kind)), "version": PROTOCOL_VERSION + 1, "features": ["new"]}
    greeting = parse(frame)
    assert isinstance(greeting, kind)
    with pytest.raises(ProtocolError, match="speaks protocol version"):
        check_version(greeting.version, "the peer")
