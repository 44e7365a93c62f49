"""How a launcher that has lost its agent finds the next one: it dials the agent's place until it is taken over."""

from __future__ import annotations

import os

from ckptd.errors import AgentError, CkptdError, FencedError, from_json
from ckptd.launcher.command import Belonging
from ckptd.launcher.control import Control
from ckptd.launcher.stdio import complain
from ckptd.protocol import endpoint
from ckptd.protocol.messages import Adopted, Hello, Message, Refused, Returned, Welcome, check_version

DIAL_EVERY_S = 0.1
_ANSWER_EVERY_S = 0.01
_ANSWER_S = 10.0


class Seeker:
    """Looks for the next agent, a little at each call, and never waits."""

    def __init__(self, belongs: Belonging) -> None:
        self._belongs = belongs
        self._until_s: float | None = None
        self._dial_at_s = 0.0
        self._dialled_s = 0.0
        self._control: Control | None = None
        self._said = ""

    def begin(self, now_s: float) -> None:
        """Begin to look: the agent is gone."""
        self._until_s, self._dial_at_s, self._said = now_s + self._belongs.wait_s, now_s, ""

    @property
    def seeking(self) -> bool:
        """Whether it is looking for an agent."""
        return self._until_s is not None

    def patience_s(self, now_s: float) -> float:
        """Return how long nothing has to be done."""
        return _ANSWER_EVERY_S if self._control is not None else max(0.0, self._dial_at_s - now_s)

    def too_late(self, now_s: float) -> bool:
        """Whether nobody has come for so long that nobody is waited for any more."""
        return self._until_s is not None and now_s >= self._until_s

    def end(self) -> None:
        """Look no more."""
        self._until_s = None
        self._drop()

    def look(self, now_s: float, ranks: list[dict[str, int]], generation: int) -> tuple[Control, list[Message]] | None:
        """Dial, or see what the one who was dialled says; return the talk with it once it has taken us over.

        What it has said already comes along. Raises `FencedError` when the job goes on without us.
        """
        if self._control is None:
            if now_s >= self._dial_at_s:
                self._dial(now_s, ranks, generation)
            return None
        messages = self._control.receive_now()
        if messages is None or now_s > self._dialled_s + _ANSWER_S:
            self._drop()
            return None
        for number, message in enumerate(messages):
            if isinstance(message, Adopted):
                control, self._control, self._until_s = self._control, None, None
                return control, messages[number + 1 :]
            if not self._goes_on(message):
                self._drop()
                return None
        return None

    def _goes_on(self, message: Message) -> bool:
        """Whether there is something left to wait for from the one who said this."""
        try:
            if isinstance(message, Welcome):
                check_version(message.version, "the agent")
                return True
            if isinstance(message, Refused):
                raise from_json(message.error)
            raise AgentError(f"the agent said {type(message).__name__} where Adopted was due")
        except FencedError:
            raise
        except CkptdError as error:
            if str(error) != self._said:
                self._said = str(error)
                complain(f"not taken over yet: {error}")
        return False

    def _dial(self, now_s: float, ranks: list[dict[str, int]], generation: int) -> None:
        self._dial_at_s, self._dialled_s = now_s + DIAL_EVERY_S, now_s
        try:
            stream = endpoint.connect(self._belongs.socket, 0.0)
        except OSError:
            return  # nobody there, or too busy to let us in
        self._control = Control(stream)
        self._control.send(Hello("launcher", os.getpid()))
        belongs = self._belongs
        self._control.send(Returned(belongs.job, belongs.incarnation, os.getpid(), generation, ranks))

    def _drop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
