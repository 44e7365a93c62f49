"""An agent whose every word a test decides: it speaks the real protocol and lends real memory, and decides nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ckptd.daemon.arena import Arena, Budget, make_page
from ckptd.errors import AgentError
from ckptd.protocol import messages as m
from ckptd.protocol.channel import Channel
from ckptd.protocol.codec import encode
from tests.daemon.harness import PATIENCE_S, until

Kind = TypeVar("Kind", bound=m.Message)
Answer = m.Message | None
TARGET = "tests.daemon.bytes_framework:BytesFramework"


class FakeAgent:
    """Listens at `path`. `said` is what its ranks have said; `answers` replaces what it answers, None for nothing."""

    def __init__(self, path: Path) -> None:
        self.said: list[m.Message] = []
        self.answers: dict[type[m.Message], Callable[[], Answer]] = {}
        self.welcome = m.Welcome(os.getpid(), [{"name": "bytes", "trigger": "ckptd", "target": TARGET}])
        self.offer: dict[str, Any] | None = None
        self.arena = Arena("job", Budget(), 2)
        descriptor, self.page = make_page("job", 0, ())
        self._page_descriptor = descriptor
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
                    socket.send_fds(channel.stream, [encode(m.to_frame(answer))], self._descriptors(answer))

    def _answer(self, message: m.Message) -> Answer:
        match message:
            case m.Hello():
                return self.welcome
            case m.Join():
                return m.Admitted(1 if self.offer is None else 2, self.offer)
            case m.Reserve():
                return m.Lent(self.arena.reserve(0, message.image_bytes, self.held), message.image_bytes)
            case m.Leave():
                return m.Done()
        return None

    @property
    def held(self) -> set[int]:
        """The slots that the page calls sealed."""
        return {number for number in self.arena.slots(0) if not self.page.slot_free(number)}

    def _descriptors(self, message: m.Message) -> list[int]:
        if isinstance(message, m.Admitted):
            return [self._page_descriptor]
        if isinstance(message, m.Lent):
            return [self.arena.slots(0)[number].descriptor for number in message.slots]
        return []

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
        self.arena.close()
