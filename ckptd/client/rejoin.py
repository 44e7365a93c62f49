"""How a rank that has lost its agent finds the next one, a little at each boundary, while training goes on.

Nothing here waits: a dial is made or refused at once, and an answer is looked for at a later boundary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from time import monotonic_ns

from ckptd.errors import AgentError, CkptdError, FencedError, ProtocolError, from_json
from ckptd.protocol import endpoint
from ckptd.protocol import messages as m
from ckptd.protocol.channel import Channel

DIAL_EVERY_NS = 10**8
_ANSWER_NS = 10 * 10**9
_SEND_S = 0.02
"""All that a dial may cost a step: what a rank says fits into the socket's buffer, so that this is never used up."""
Compose = Callable[[], tuple[m.Rejoin, Sequence[int]]]
"""Returns what to say to the next agent, and the descriptors that go with it."""


class Rejoining:
    """A look for the next agent, which ends when one has taken the rank over, or at its deadline."""

    def __init__(self, path: str, wait_s: float) -> None:
        """Look at `path` for `wait_s` from now on."""
        self.lost_ns = monotonic_ns()
        self._path = path
        self._wait_s = wait_s
        self._dial_ns = 0
        self._dialled_ns = 0
        self._channel: Channel | None = None

    def hurry(self, wait_s: float) -> None:
        """Look for `wait_s` more at most."""
        self._wait_s = min(self._wait_s, (monotonic_ns() - self.lost_ns) / 1e9 + wait_s)

    def look(self, compose: Compose) -> Channel | None:
        """Dial, or see what the one who was dialled says; return the conversation with it once it has taken us over.

        Raises `FencedError` when the job goes on without this rank, and `AgentError` when nobody has come in time.
        """
        now_ns = monotonic_ns()
        if now_ns - self.lost_ns > self._wait_s * 1e9:
            self.close()
            raise AgentError(f"no agent has come back within {self._wait_s:g} s")
        if self._channel is None:
            if now_ns >= self._dial_ns:
                self._dial(now_ns, compose)
            return None
        try:
            answer = self._channel.poll()
            if isinstance(answer, m.Welcome):
                m.check_version(answer.version, "the agent")
                answer = self._channel.poll()
            if isinstance(answer, m.Refused):
                raise from_json(answer.error)
        except FencedError:
            self.close()
            raise
        except CkptdError:
            self.close()  # it does not have the job, or not yet
            return None
        if isinstance(answer, m.Adopted):
            channel, self._channel = self._channel, None
            return channel
        if now_ns - self._dialled_ns > _ANSWER_NS:
            self.close()
        return None

    def _dial(self, now_ns: int, compose: Compose) -> None:
        self._dial_ns, self._dialled_ns = now_ns + DIAL_EVERY_NS, now_ns
        try:
            self._channel = Channel(endpoint.connect(self._path, 0.0))
        except OSError:
            return  # nobody there, or too busy to let us in
        message, descriptors = compose()
        try:
            self._channel.send(m.Hello("rank", os.getpid()), _SEND_S)
            self._channel.send_with(message, descriptors, _SEND_S)
        except (AgentError, ProtocolError):
            self.close()

    def close(self) -> None:
        """Hang up on whoever was dialled last."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
