"""A rank's session with its agent: the conversation, the control page and the lent slots. No decision is made here."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from time import monotonic_ns
from typing import Any

from ckptd.client.garbage import no_collections
from ckptd.client.guard import AgentAwayError, say
from ckptd.client.parent import Parent
from ckptd.client.rejoin import Rejoining
from ckptd.errors import AgentError, CkptdError, MemoryBudgetError, ProtocolError
from ckptd.protocol import messages as m
from ckptd.protocol.channel import Channel, close_if_open, expect
from ckptd.protocol.page import ControlPage, Word

ADMIT_DEADLINE_S = 600.0
"""Joining waits for every rank of the job, and for the store to be read."""
CALL_DEADLINE_S = 60.0
SEND_DEADLINE_S = 2.0
LEAVE_DEADLINE_S = 300.0
_LAST_WAIT_S = 15.0
"""So long a rank that somebody else has started waits for an agent when it has finished: its process is theirs."""
MAX_FILES = 64
"""How many descriptors an answer may carry."""
_QUIET_NS = 5 * 10**8
"""So long after the agent has shown itself on the control page a rank asks the kernel whether it is there."""
_HUNG_NS = 10 * 10**9
_MAX_UNTOLD = 1000
_POLL_S = 0.01


class LentSlot:
    """A slot as the rank sees it, mapped and populated, so that no capture pays for page faults.

    It takes over its descriptor.
    """

    def __init__(self, number: int, descriptor: int, size_bytes: int) -> None:
        self.number = number
        self.size_bytes = size_bytes
        self.descriptor = descriptor
        """Kept for the next agent, should this one die."""
        # No MADV_DONTFORK: a shared map costs a fork nothing, while a child that unmaps what it does not have may
        # hit what it has mapped there instead.
        try:
            self._map = mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            raise MemoryBudgetError(
                f"a slot of {size_bytes} bytes can't be mapped: {error.strerror}", hint="is `ulimit -v` set?"
            ) from error
        except ValueError as error:
            raise ProtocolError(f"the agent has lent a slot that can't be mapped: {error}") from error

    @property
    def view(self) -> memoryview:
        """The whole slot, writable."""
        return memoryview(self._map)

    def close(self) -> None:
        """Unmap it, at the latest with the last view, which the traceback of a fault may hold."""
        if self.descriptor >= 0:
            close_if_open(self.descriptor)
            self.descriptor = -1
        with contextlib.suppress(BufferError):
            self._map.close()


class Session:
    """Joined once, used until the rank leaves. Every method keeps its deadline or raises `AgentError`.

    When the agent dies and the job outlives it, the session goes on: what is to be told waits for the next agent, which
    `look` finds. What needs an answer then raises `AgentAwayError`, or waits too while the session is `patient`.
    """

    def __init__(self, channel: Channel, path: str = "") -> None:
        """Talk over `channel` to the agent at `path`."""
        self._channel = channel
        self._path = path
        self._page: ControlPage | None = None
        self._page_descriptor = -1
        self._place = ("", 0)
        self._incarnation = ""
        self._agent_wait_s = 0.0
        self._leaving = False
        self._parent: Parent | None = None
        self._away: Rejoining | None = None
        self._untold: list[m.Message] = []
        """What waits for the next agent. Seals are not in it: a rank that comes back says what its slots hold."""
        self._seals: dict[int, m.Seal] = {}
        """The last seal of each slot."""
        self._reported: dict[int, m.Seal] = {}
        """Those that the next agent was told of when it was dialled last."""
        self._restored = self._stepped = False
        self._said_quiet = False
        self.replaced = False
        """Whether this agent is another one than that which let the rank in: what that one held is gone."""
        self.patient = True
        """Whether training waits anyway: before its first step and after its last."""
        self.slots: dict[int, LentSlot] = {}
        self.generation = 0
        self.offer: Mapping[str, Any] | None = None
        self.numbers: Mapping[str, Any] = {}
        """What to do with reported numbers, and which steps to skip, as `Admitted` says."""
        self.document: Mapping[str, Any] = {}
        """The manifest of what is offered."""

    @property
    def page(self) -> ControlPage:
        """The control page; there is one after `join`."""
        if self._page is None:
            raise AgentError("the session has not joined a job")
        return self._page

    def join(self, message: m.Join) -> None:
        """Take the rank's place; afterwards `page`, `generation`, `offer` and its `document` are known."""
        answer = expect(self._channel.call(message, ADMIT_DEADLINE_S), m.Admitted)
        self.generation, self.offer, self.numbers = answer.generation, answer.offer, answer.numbers
        self._incarnation, self._agent_wait_s = answer.incarnation, answer.agent_wait_s
        self._place = message.job, message.rank
        self._restored = answer.offer is None
        if message.generation:
            self._parent = Parent()
        descriptors = self._channel.take_descriptors(1 if answer.offer is None else 2)
        try:
            self._page = _map_page(descriptors[0])
            self._page_descriptor = descriptors.pop(0)
            if answer.offer is not None:
                self.document = _read_document(descriptors[0])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        if not self._page.valid:
            raise ProtocolError("the agent's control page has another layout than this client knows")

    def open(self, files: Sequence[str]) -> list[int]:
        """Ask for descriptors of files of the offer, `MAX_FILES` at most; the caller closes them."""
        answer = expect(self._call(m.Open(list(files)), CALL_DEADLINE_S), m.Opened)
        if answer.files != list(files):
            raise ProtocolError("the agent opened other files than those that were asked for")
        return self._channel.take_descriptors(len(files))

    def reserve(self, image_bytes: int) -> None:
        """Ask for slots of at least `image_bytes`; slots that are not lent again are unmapped."""
        answer = expect(self._call(m.Reserve(image_bytes), CALL_DEADLINE_S), m.Lent)
        descriptors = self._channel.take_descriptors(len(answer.slots))
        for slot in self.slots.values():
            slot.close()
        self.slots = {}
        try:
            for number in answer.slots:
                descriptor = descriptors[0]
                self.slots[number] = LentSlot(number, descriptor, os.fstat(descriptor).st_size)
                descriptors.pop(0)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def free_slot(self, image_bytes: int) -> LentSlot | None:
        """Return a slot that may be written and is large enough, None when all are busy."""
        for number, slot in self.slots.items():
            if slot.size_bytes >= image_bytes and self.page.slot_free(number):
                return slot
        return None

    def fits(self, image_bytes: int) -> bool:
        """Whether the lent slots can hold an image of that size."""
        return any(slot.size_bytes >= image_bytes for slot in self.slots.values())

    def tell(self, message: m.Message) -> None:
        """Send a message that needs no answer; without agent it waits for the next one."""
        if isinstance(message, m.Seal):
            self._seals[message.slot] = message
        self._restored = self._restored or isinstance(message, m.Restored)
        self._stepped = self._stepped or isinstance(message, m.Stepped)
        if self._away is None:
            try:
                self._channel.send(message, SEND_DEADLINE_S)
            except AgentError:
                if not self._lose():
                    raise
            else:
                return
        if not isinstance(message, m.Seal) and len(self._untold) < _MAX_UNTOLD:
            self._untold.append(message)

    def _call(
        self, message: m.Message, deadline_s: float, before_next: Callable[[], object] = lambda: None
    ) -> m.Message:
        """Ask the agent; if it dies meanwhile and training waits anyway, ask the next one."""
        while True:
            if self._away is not None and not self.patient:
                raise AgentAwayError("the agent is gone, and the next one is not there yet")
            waits = self._away is not None
            while self._away is not None:
                self.look()
                time.sleep(_POLL_S)
            if waits:
                before_next()
            try:
                return self._channel.call(message, deadline_s)
            except (AgentError, ProtocolError):
                if not self.lost or not self._lose():
                    raise
            except BaseException:  # a signal's handler has given it up, and the connection with it
                if self.lost:
                    self._lose()
                raise

    # --- the loss of the agent --------------------------------------------------------------------------------

    def look(self) -> None:
        """See whether the agent is there, and look for the next one while it is not; costs nothing most of the time.

        Raises `AgentError` once it is lost and nobody comes in its place.
        """
        if self._away is not None:
            self._seek(self._away)
            return
        quiet_ns = monotonic_ns() - self.page.words[Word.AGENT_NS]
        if quiet_ns < _QUIET_NS:
            self._said_quiet = False
            return
        if self._is_gone():
            self._channel.close()
            if not self._lose():
                raise AgentError("the agent has closed the connection")
        elif quiet_ns > _HUNG_NS and self.page.words[Word.AGENT_NS] and not self._said_quiet:
            self._said_quiet = True
            say(f"the agent has done nothing for {quiet_ns / 1e9:.0f} s: no checkpoint is made until it does")

    def _is_gone(self) -> bool:
        stream = self._channel.stream
        try:
            stream.settimeout(0)
            return not stream.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _lose(self) -> bool:
        """Begin to look for the next agent; return False when the job does not outlive this one."""
        if self._parent is not None:
            self._parent.die_with()
        if not self._agent_wait_s or self._page is None:
            self._end_if_alone()
            return False
        self._away = Rejoining(self._path, self._agent_wait_s)
        self._hurry()
        return True

    def _hurry(self) -> None:
        if self._leaving and self._parent is None and self._away is not None:
            self._away.hurry(_LAST_WAIT_S)

    def _seek(self, away: Rejoining) -> None:
        try:
            channel = away.look(self._compose)
        except AgentError:
            self._away = None
            self._end_if_alone()
            raise
        except CkptdError as error:
            self._away = None
            raise AgentError(error.message) from error
        if channel is None:
            return
        self._away, self._channel, self.replaced = None, channel, True
        if self._parent is not None:
            self._parent.outlive()
        untold, self._untold = self._untold, []
        sealed = [seal for slot, seal in self._seals.items() if self._reported.get(slot) is not seal]
        for message in (*sealed, *untold):
            self.tell(message)

    def _compose(self) -> tuple[m.Rejoin, list[int]]:
        """Return what to say to the next agent, and what to hand back to it."""
        self._reported = dict(self._seals)
        slots: list[dict[str, Any]] = []
        for number in self.slots:
            seal = self._seals.get(number)
            slots.append({"slot": number, "seal": None if seal is None else seal.__dict__})
        job, rank = self._place
        step = int(self.page.words[Word.STEP])
        message = m.Rejoin(job, rank, self.generation, self._incarnation, step, self._restored, self._stepped, slots)
        return message, [self._page_descriptor, *(slot.descriptor for slot in self.slots.values())]

    def _end_if_alone(self) -> None:
        if self._parent is not None:
            self._parent.end_if_gone()

    def trains(self) -> None:
        """Note that training begins: the agent watches over it, and nothing may make it wait."""
        self.patient = False
        if self._parent is not None and self._away is None:
            self._parent.outlive()

    def training_is_over(self) -> None:
        """Note that only the last checkpoint is waited for now."""
        self._leaving = True
        self._hurry()

    @property
    def lost(self) -> bool:
        """Whether the connection is closed for good, so that nothing can be told or asked any more."""
        return self._away is None and self._channel.stream.fileno() < 0

    def leave(self, step: int, before_next: Callable[[], object]) -> None:
        """Leave the training block; returns when nothing of this rank waits to be committed.

        `before_next` is called before the same is asked of another agent, should this one die meanwhile.
        """
        self.patient = True
        expect(self._call(m.Leave(step), LEAVE_DEADLINE_S, before_next), m.Done)

    def close(self) -> None:
        """Let go of everything."""
        if self._away is not None:
            self._away.close()
            self._away = None
        self._channel.close()
        for slot in self.slots.values():
            slot.close()
        self.slots = {}
        if self._page is not None:
            # It is unmapped when nobody uses it any more, such as a step that a signal has interrupted.
            self._page = None
            close_if_open(self._page_descriptor)


def _map_page(descriptor: int) -> ControlPage:
    try:
        return ControlPage(descriptor)
    except ValueError as error:
        raise ProtocolError(f"the agent's control page can't be mapped: {error}") from error


def _read_document(descriptor: int) -> dict[str, Any]:
    try:
        with no_collections():
            document = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    except ValueError as error:
        raise ProtocolError("the manifest of the offered checkpoint is not JSON") from error
    if not isinstance(document, dict):
        raise ProtocolError("the manifest of the offered checkpoint is no JSON object")
    return document
