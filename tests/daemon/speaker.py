"""A rank that speaks the protocol itself, in the test's own process."""

from __future__ import annotations

import json
import os
from typing import Any

from ckptd.protocol import messages as m
from ckptd.protocol.channel import open_channel
from ckptd.protocol.page import ControlPage
from tests.daemon.harness import PATIENCE_S, Node


class Speaker:
    """A rank that speaks the protocol itself, in the test's own process."""

    def __init__(self, node: Node, role: str = "rank") -> None:
        self.channel, _ = open_channel(str(node.socket), role, PATIENCE_S)
        self.page: ControlPage | None = None
        self.document: dict[str, Any] = {}
        self._options = {"store": str(node.store), "every_s": 0.1}

    def ask(self, message: m.Message) -> m.Message:
        """Send a request and return the answer; a refusal is raised."""
        return self.channel.call(message, PATIENCE_S)

    def join(self, job: str = "job", **options: Any) -> m.Message:
        """Join a job as its only rank; the page is mapped and let go of."""
        answer = self.ask(m.Join(job, 0, 1, 0, {**self._options, **options}))
        assert isinstance(answer, m.Admitted)
        descriptor, *offered = self.channel.take_descriptors(1 if answer.offer is None else 2)
        for manifest in offered:
            self.document = json.loads(os.pread(manifest, os.fstat(manifest).st_size, 0))
            os.close(manifest)
        self.page = ControlPage(descriptor)
        os.close(descriptor)
        assert self.page.valid
        return answer

    def close(self) -> None:
        """Go without a word."""
        self.channel.close()
        if self.page is not None:
            self.page.close()
