"""A rank's session with its agent: the conversation, the control page and the lent slots. No decision is made here."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from ckptd.client.garbage import no_collections
from ckptd.errors import AgentError, ProtocolError
from ckptd.protocol import messages as m
from ckptd.protocol.channel import Channel, expect
from ckptd.protocol.page import ControlPage

ADMIT_DEADLINE_S = 600.0
"""Joining waits for every rank of the job, and for the store to be read."""
CALL_DEADLINE_S = 60.0
SEND_DEADLINE_S = 2.0
LEAVE_DEADLINE_S = 300.0
MAX_FILES = 64
"""How many descriptors an answer may carry."""


class LentSlot:
    """A slot as the rank sees it, mapped and populated, so that no capture pays for page faults."""

    def __init__(self, number: int, descriptor: int, size_bytes: int) -> None:
        self.number = number
        self.size_bytes = size_bytes
        # No MADV_DONTFORK: a shared map costs a fork nothing, while a child that unmaps what it does not have may
        # hit what it has mapped there instead.
        self._map = mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)

    @property
    def view(self) -> memoryview:
        """The whole slot, writable."""
        return memoryview(self._map)

    def close(self) -> None:
        """Unmap it, at the latest with the last view, which the traceback of a fault may hold."""
        with contextlib.suppress(BufferError):
            self._map.close()


class Session:
    """Joined once, used until the rank leaves. Every method keeps its deadline or raises `AgentError`."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._page: ControlPage | None = None
        self.slots: dict[int, LentSlot] = {}
        self.generation = 0
        self.offer: Mapping[str, Any] | None = None
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
        self.generation, self.offer = answer.generation, answer.offer
        descriptors = self._channel.take_descriptors(1 if answer.offer is None else 2)
        try:
            self._page = ControlPage(descriptors[0])
            if answer.offer is not None:
                self.document = _read_document(descriptors[1])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        if not self._page.valid:
            raise ProtocolError("the agent's control page has another layout than this client knows")

    def open(self, files: Sequence[str]) -> list[int]:
        """Ask for descriptors of files of the offer, `MAX_FILES` at most; the caller closes them."""
        answer = expect(self._channel.call(m.Open(list(files)), CALL_DEADLINE_S), m.Opened)
        if answer.files != list(files):
            raise ProtocolError("the agent opened other files than those that were asked for")
        return self._channel.take_descriptors(len(files))

    def reserve(self, image_bytes: int) -> None:
        """Ask for slots of at least `image_bytes`; slots that are not lent again are unmapped."""
        answer = expect(self._channel.call(m.Reserve(image_bytes), CALL_DEADLINE_S), m.Lent)
        descriptors = self._channel.take_descriptors(len(answer.slots))
        try:
            for slot in self.slots.values():
                slot.close()
            self.slots = {
                number: LentSlot(number, descriptor, os.fstat(descriptor).st_size)
                for number, descriptor in zip(answer.slots, descriptors, strict=True)
            }
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
        """Send a message that needs no answer."""
        self._channel.send(message, SEND_DEADLINE_S)

    def check(self) -> None:
        """Raise `AgentError` when the agent has closed the connection; costs one system call."""
        stream = self._channel.stream
        try:
            stream.settimeout(0)
            gone = not stream.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone:
            self._channel.close()
            raise AgentError("the agent has closed the connection")

    @property
    def lost(self) -> bool:
        """Whether the connection is closed, and so nothing can be told or asked any more."""
        return self._channel.stream.fileno() < 0

    def leave(self, step: int) -> None:
        """Leave the training block; returns when nothing of this rank waits to be committed."""
        expect(self._channel.call(m.Leave(step), LEAVE_DEADLINE_S), m.Done)

    def close(self) -> None:
        """Let go of everything."""
        self._channel.close()
        for slot in self.slots.values():
            slot.close()
        self.slots = {}
        if self._page is not None:
            self._page.close()
            self._page = None


def _read_document(descriptor: int) -> dict[str, Any]:
    try:
        with no_collections():
            document = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    except ValueError as error:
        raise ProtocolError("the manifest of the offered checkpoint is not JSON") from error
    if not isinstance(document, dict):
        raise ProtocolError("the manifest of the offered checkpoint is no JSON object")
    return document
