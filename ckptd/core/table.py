"""Transition tables: everything that moves a state machine stands in one dict, and an illegal event is a bug."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

from ckptd.errors import invariant

State = TypeVar("State", bound=Enum)
Event = TypeVar("Event", bound=Enum)


class TransitionTable(Generic[State, Event]):
    """Maps state and event to the next state."""

    def __init__(self, name: str, table: Mapping[State, Mapping[Event, State]]) -> None:
        self.name = name
        self.table = table

    def next(self, state: State, event: Event) -> State:
        """Return the state that follows; an event that is illegal there crashes, since it means a bug of ours."""
        following = self.table[state].get(event)
        invariant(following is not None, f"{self.name}: {event.value} is illegal while {state.value}")
        assert following is not None  # for the type checker; the line above holds under -O too
        return following

    def allows(self, state: State, event: Event) -> bool:
        """Whether the event may happen in that state."""
        return event in self.table[state]

    def describe(self) -> str:
        """Return the table as text, one `state --event--> state` a line; the READMEs show it, and a test compares."""
        return "\n".join(
            f"{state.value} --{event.value}--> {after.value}"
            for state, moves in self.table.items()
            for event, after in moves.items()
        )
