"""Virtual time: an event queue, and tasks written as generators that run on it.

A task yields a number of seconds to wait for, or a `Signal` to wait for. Each resumption is one event, so a fault can
come between any two of them. An event whose owner is not alive any more is dropped: that is what `kill -9` does.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from itertools import count
from typing import Any, Protocol


class Owner(Protocol):
    """Whoever runs a task: a process, or the world itself."""

    alive: bool


class Signal:
    """Something that happens once; tasks that wait for it get its value."""

    def __init__(self, clock: Clock) -> None:
        self.fired = False
        self.value: Any = None
        self._clock = clock
        self._waiting: list[tuple[Owner, str, Task]] = []

    def fire(self, value: Any = None) -> None:
        """Let it happen, unless it has already."""
        if self.fired:
            return
        self.fired, self.value = True, value
        for owner, kind, task in self._waiting:
            self._clock.after(0.0, owner, kind, task.resume, value)

    def wait(self, owner: Owner, kind: str, task: Task) -> None:
        """Resume `task` when it happens."""
        if self.fired:
            self._clock.after(0.0, owner, kind, task.resume, self.value)
        else:
            self._waiting.append((owner, kind, task))


Steps = Generator["float | Signal", Any, Any]


class Task:
    """A running generator."""

    def __init__(self, clock: Clock, owner: Owner, kind: str, steps: Steps) -> None:
        self._clock, self._owner, self._kind, self._steps = clock, owner, kind, steps
        self.done = Signal(clock)

    def resume(self, value: Any = None) -> None:
        """Run it up to its next wait."""
        try:
            wanted = self._steps.send(value)
        except StopIteration as end:
            self.done.fire(end.value)
            return
        if isinstance(wanted, Signal):
            wanted.wait(self._owner, self._kind, self)
        else:
            self._clock.after(wanted, self._owner, self._kind, self.resume)


class Clock:
    """The event queue. Two events at the same time happen in the order in which they were put there."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0
        self._numbers = count()
        self._heap: list[tuple[float, int, Owner, str, Callable[..., None], tuple[Any, ...]]] = []

    def after(self, delay_s: float, owner: Owner, kind: str, call: Callable[..., None], *arguments: Any) -> None:
        """Call `call` after `delay_s`, if `owner` is alive then."""
        heapq.heappush(self._heap, (self.now_s + delay_s, next(self._numbers), owner, kind, call, arguments))

    def start(self, owner: Owner, kind: str, steps: Steps, delay_s: float = 0.0) -> Task:
        """Start a task."""
        task = Task(self, owner, kind, steps)
        self.after(delay_s, owner, kind, task.resume)
        return task

    def step(self, before: Callable[[str], None]) -> str | None:
        """Let the next event happen, after telling `before` its kind; return the kind, None when there is no event."""
        while self._heap:
            at_s, _, owner, kind, call, arguments = heapq.heappop(self._heap)
            if not owner.alive:
                continue
            self.now_s = at_s
            self.events += 1
            before(kind)
            if owner.alive:  # what comes before may have killed it
                call(*arguments)
            return kind
        return None


class Channel:
    """A socket in one direction: messages arrive late, but whole and in order. Its owner is the reader."""

    def __init__(self, clock: Clock, reader: Owner, kind: str, latency_s: Callable[[], float]) -> None:
        self._clock, self._reader, self._kind, self._latency_s = clock, reader, kind, latency_s
        self._last_at_s = 0.0

    def send(self, deliver: Callable[..., None], *arguments: Any) -> None:
        """Call `deliver` at the reader's end, some time later."""
        at_s = max(self._last_at_s, self._clock.now_s + self._latency_s())
        self._last_at_s = at_s
        self._clock.after(at_s - self._clock.now_s, self._reader, self._kind, deliver, *arguments)
