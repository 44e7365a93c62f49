"""An agent whose every word a test decides: it speaks the real protocol and lends real memory, and decides nothing."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ckptd.errors import AgentError, StoreError
from ckptd.protocol import messages as m
from ckptd.protocol.channel import Channel
from ckptd.protocol.codec import encode
from ckptd.protocol.page import PAGE_BYTES, ControlPage
from tests.client.fake_framework import TARGET, image_of
from tests.daemon.harness import PATIENCE_S, until

Kind = TypeVar("Kind", bound=m.Message)
Answer = m.Message | None


class FakeSlot:
    """A slot as an agent has it."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.descriptor = region("slot", size_bytes)
        self._map = mmap.mmap(self.descriptor, size_bytes)

    @property
    def contents(self) -> bytes:
        """What it holds."""
        return self._map[:]

    def close(self) -> None:
        """Give the memory back."""
        self._map.close()
        os.close(self.descriptor)


def region(name: str, size_bytes: int) -> int:
    """Return the descriptor of memory with the kind of name that an agent's has."""
    descriptor = os.memfd_create(f"ckptd-{name}", os.MFD_CLOEXEC)
    os.posix_fallocate(descriptor, 0, size_bytes)
    return descriptor


class FakeAgent:
    """Listens at `path`. `said` is what its ranks have said; `answers` replaces what it answers, None for nothing."""

    def __init__(self, path: Path) -> None:
        self.said: list[m.Message] = []
        self.answers: dict[type[m.Message], Callable[[], Answer]] = {}
        self.welcome = m.Welcome(os.getpid(), [{"name": "fake", "trigger": "ckptd", "target": TARGET}])
        self.offer: dict[str, Any] | None = None
        self.document: bytes = b""
        self.files: dict[str, bytes] = {}
        """What the offered checkpoint consists of."""
        self.slots: dict[int, FakeSlot] = {}
        self._page_descriptor = region("page", PAGE_BYTES)
        self.page = ControlPage(self._page_descriptor)
        self.page.format()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._channels: list[Channel] = []
        self._threads = [threading.Thread(target=self._accept, name="fake agent")]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                stream, _ = self._listening.accept()
                channel = Channel(stream)
                self._channels.append(channel)
                thread = threading.Thread(target=self._serve, args=(channel,), name="fake agent's connection")
                self._threads.append(thread)
                thread.start()

    def _serve(self, channel: Channel) -> None:
        with contextlib.suppress(AgentError, OSError):
            while True:
                message = channel.receive(PATIENCE_S)
                self.said.append(message)
                make = self.answers.get(type(message))
                answer = self._answer(message) if make is None else make()
                if answer is not None:
                    self._send(channel, answer)

    def _answer(self, message: m.Message) -> Answer:
        match message:
            case m.Hello():
                return self.welcome
            case m.Join():
                return m.Admitted(1 if self.offer is None else 2, self.offer)
            case m.Reserve():
                return m.Lent(self._reserve(message.image_bytes), message.image_bytes)
            case m.Open():
                missing = [file for file in message.files if file not in self.files]
                return m.Refused(StoreError(f"{missing[0]} is gone").to_json()) if missing else m.Opened(message.files)
            case m.Leave():
                return m.Done()
        return None

    def _reserve(self, size_bytes: int) -> list[int]:
        """Make two slots that are large enough; too small ones that hold nothing are given back."""
        for number, slot in list(self.slots.items()):
            if slot.size_bytes < size_bytes and number not in self.held:
                self.slots.pop(number).close()
        good = [number for number, slot in self.slots.items() if slot.size_bytes >= size_bytes]
        for number in range(8):
            if len(good) < 2 and number not in self.slots:
                self.slots[number] = FakeSlot(size_bytes)
                good.append(number)
        return sorted(good)

    @property
    def held(self) -> set[int]:
        """The slots that the page calls sealed."""
        return {number for number in self.slots if not self.page.slot_free(number)}

    def _send(self, channel: Channel, answer: m.Message) -> None:
        made: list[int] = []
        if isinstance(answer, m.Admitted):
            made = [os.dup(self._page_descriptor)]
            if answer.offer is not None:
                made.append(_memory(self.document))
        elif isinstance(answer, m.Opened):
            made = [_memory(self.files[file]) for file in answer.files]
        elif isinstance(answer, m.Lent):
            made = [os.dup(self.slots[number].descriptor) for number in answer.slots]
        try:
            socket.send_fds(channel.stream, [encode(m.to_frame(answer))], made)
        finally:
            for descriptor in made:
                os.close(descriptor)

    def heard(self, kind: type[Kind]) -> list[Kind]:
        """Return the messages of a kind, as far as they have arrived."""
        return [message for message in list(self.said) if isinstance(message, kind)]

    def wait_for(self, kind: type[Kind], count: int = 1) -> Kind:
        """Wait for so many messages of a kind, and return the last."""
        until(lambda: len(self.heard(kind)) >= count, f"{count} {kind.__name__}")
        assert len(self.heard(kind)) == count
        return self.heard(kind)[-1]

    def drain(self) -> None:
        """Wait until everything that was said has been heard, now that every rank has hung up."""
        for thread in self._threads[1:]:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def hang_up(self) -> None:
        """Close every connection."""
        for channel in self._channels:
            with contextlib.suppress(OSError):
                channel.stream.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End every thread and give everything back."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(PATIENCE_S)
        self.hang_up()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        for channel in self._channels:
            channel.close()
        self._listening.close()
        self.page.close()
        os.close(self._page_descriptor)
        for slot in self.slots.values():
            slot.close()


def offer(agent: FakeAgent, state: dict[str, Any], step: int = 40, **document: Any) -> None:
    """Offer an image of a state as a checkpoint in memory."""
    agent.files = {"g000001/rank-00000": image_of(state)}
    agent.document = json.dumps({"files": list(agent.files), **document}).encode()
    agent.offer = {"generation": 1, "step": step, "tier": "memory", "in_memory": True}


def _memory(data: bytes) -> int:
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(descriptor, data)
    return descriptor
