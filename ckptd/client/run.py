"""A run: what training code holds. `step()` costs one integer comparison unless something is due."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, MutableMapping
from time import monotonic_ns
from types import TracebackType
from typing import Any, Self

from ckptd.client.capturing import Capturing
from ckptd.client.framework import Binding
from ckptd.client.guard import Guard, attempt
from ckptd.client.overlap import OverlapChooser
from ckptd.client.restoring import Restored, restore
from ckptd.client.session import Session
from ckptd.errors import StateError
from ckptd.protocol import messages as m
from ckptd.protocol.page import NEVER, Phase, Word

_STEP, _BEAT, _PHASE, _CAPTURE = int(Word.STEP), int(Word.BEAT_NS), int(Word.PHASE), int(Word.CAPTURE_STEP)
_LOOK_EVERY_NS = 5 * 10**9
"""How often a rank looks whether its agent is still there; it costs a system call."""
_runs: list[Run] = []


class Run:
    """One rank's part in a job, from `ckptd.attach` to the end of its block.

    `generation` counts the job's incarnations from 1. `restored` is None after a fresh start. `state` holds the
    attached objects by name; a value that can't be filled in place, such as an int, is read and written there.
    """

    def __init__(self, *, strict: bool = False, overlap: str = "auto") -> None:
        self.generation = 1
        self.restored: Restored | None = None
        self.state: MutableMapping[str, Any] = {}
        self._overlap = overlap
        self._session: Session | None = None
        self._binding: Binding | None = None
        self._capturing: Capturing | None = None
        self._guard = Guard(strict=strict, on_open=self._unprotect)
        self._words: Any = _dead_words()
        self._step = 0
        self._look_ns = 0
        self._due_ns = 0
        self._handled = NEVER
        self._values: dict[str, Any] = {}
        self._place = ("", 0, 0)
        self._bind: Callable[[dict[str, Any]], None] | None = None

    # --- training ---------------------------------------------------------------------------------------------

    def steps(self, total: int) -> Iterator[int]:
        """Yield the numbers of the steps still to do, from the one after the restored step up to `total`.

        Steps count from 1, so that step N done means N optimizer steps done. A step is over when the loop asks for
        the next one.
        """
        while self._step < total:
            yield self._step + 1
            self.step()

    def step(self) -> None:
        """Say that one training step is over. Here, and nowhere else, ckptd may capture."""
        step = self._step + 1
        self._step = step
        words = self._words
        words[_STEP] = step
        words[_BEAT] = now_ns = monotonic_ns()
        if step >= words[_CAPTURE] or now_ns >= self._due_ns:
            self._boundary(step, now_ns)

    def report(self, **values: Any) -> None:
        """Report metrics of the present step, such as `loss`; the next checkpoint's manifest carries them.

        Numbers and one-element tensors; a tensor is read only when a checkpoint needs it, so that a loss on a GPU
        is not waited for.
        """
        for name, value in values.items():
            detach = getattr(value, "detach", None)
            self._values[name] = value if detach is None else detach()  # drop the graph, keep the number

    def checkpoint(self) -> None:
        """Ask for a checkpoint at the next step that all ranks can meet; returns at once."""
        self._guarded("asking for a checkpoint", self._tell, m.Request(self._step))

    def attach(self, **state: Any) -> Run:
        """Attach the objects of a run that `@resumable` handed over, and restore them; to be called once."""
        if self._bind is None:
            raise StateError("this run has its objects already", hint="name them all in one call")
        bind, self._bind = self._bind, None
        bind(state)
        return self

    @property
    def protected(self) -> bool:
        """Whether checkpoints are being taken."""
        return self._session is not None

    # --- boundaries -------------------------------------------------------------------------------------------

    def _boundary(self, step: int, now_ns: int) -> None:
        capturing = self._capturing
        if capturing is None:
            self._due_ns = NEVER
            self._unbind()
            return
        if now_ns >= capturing.due_ns:
            self._guarded("a copy beside training", capturing.boundary, now_ns)
        if now_ns >= self._look_ns:
            first, self._look_ns = self._look_ns == 0, now_ns + _LOOK_EVERY_NS
            if first:
                self._guarded("preparing slots", self._first_step, capturing, step)
            elif self._session is not None:
                self._guarded("a look at the agent", self._session.check)
        wanted = self._words[_CAPTURE]
        if step >= wanted and wanted != self._handled:
            self._handled = wanted
            if step == wanted:
                self._guarded("a capture", capturing.capture, step)
            else:
                self._guarded("a message", capturing.missed, wanted, step)
        if self._capturing is not None:
            self._due_ns = min(self._look_ns, capturing.due_ns)

    def _guarded(self, what: str, work: Callable[..., object], *arguments: Any) -> None:
        """Do something that may fail; a connection that is lost with it is lost for good."""
        self._guard.run(what, work, *arguments)
        if self._session is not None and self._session.lost:
            self._guard.trip("the connection to the agent is lost")

    def _first_step(self, capturing: Capturing, step: int) -> None:
        self._tell(m.Stepped(step, time.monotonic()))
        # An optimizer has its state only now: get slots that fit before the first capture needs them.
        capturing.reserve(step)

    def _before_optimizer_step(self) -> None:
        """Wait for a copy that runs beside training; the framework calls this before every optimizer's step."""
        capturing = self._capturing
        if capturing is not None and capturing.waiting:
            self._guarded("a copy beside training", capturing.before_optimizer_step)

    # --- beginning and end ------------------------------------------------------------------------------------

    def _begin(self, session: Session, binding: Binding, place: tuple[str, int]) -> None:
        """Take over a joined session: restore what is offered and get slots. Raises what `attach` should raise."""
        self._session, self._binding = session, binding
        self._place = (*place, session.generation)
        self.state = binding.state
        self.generation = session.generation
        self._words = words = session.page.words
        _runs.append(self)
        chooser = OverlapChooser(self._overlap, surely_cheaper=binding.overlaps_by_default)
        self._capturing = capturing = Capturing(session, binding, chooser, self._values)
        self.restored = restore(session, binding)
        if self.restored is not None:
            step = self.restored.step
            words[_STEP] = self._step = capturing.captured_step = step
            session.tell(m.Restored(self.restored.generation, step, self.restored.seconds))
        # Only now, because what an optimizer has restored needs room too.
        capturing.reserve(self._step)
        if chooser.overlaps:
            binding.before_optimizer_steps(self._before_optimizer_step)
        self._look_ns = self._due_ns = 0
        words[_PHASE] = Phase.TRAINING

    def close(self) -> None:
        """End the run after its last step: a final capture, and a wait until it is durable."""
        try:
            if self._capturing is not None:
                self._guarded("a copy beside training", self._capturing.settle)
            if self._capturing is not None:
                self._guard.run("the last checkpoint", self._finish, self._capturing)
        finally:
            self._end()

    def _finish(self, capturing: Capturing) -> None:
        capturing.finish(self._step)
        self._words[_PHASE] = Phase.LEFT
        if self._session is not None:
            self._session.leave(self._step)

    def _unprotect(self) -> None:
        """Let go of the agent. The binding stays until the next boundary: this may run in a hook of the framework's."""
        self._words = _dead_words()
        self._due_ns = 0
        session, self._session = self._session, None
        capturing, self._capturing = self._capturing, None
        if self in _runs:
            _runs.remove(self)
        if capturing is not None:
            attempt("a copy beside training", capturing.drop)
        if session is not None:
            session.close()

    def _unbind(self) -> None:
        binding, self._binding = self._binding, None
        if binding is not None:
            attempt("letting go of the framework", binding.close)

    def _end(self) -> None:
        """Let go of everything."""
        self._unprotect()
        self._unbind()

    def _forked(self) -> None:
        """Let go of the session in a forked child: it belongs to the parent."""
        self._words = _dead_words()
        self._binding = None
        session, self._session = self._session, None
        capturing, self._capturing = self._capturing, None
        if capturing is not None:
            capturing.forget()
        if session is not None:
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        try:
            # Said, never raised, also when strict: the exception on its way matters more.
            if self._capturing is not None:
                attempt("a copy beside training", self._capturing.settle)
            if isinstance(error, Exception):
                attempt("reporting the exception", self._report_exception, error)
        finally:
            self._end()

    def _report_exception(self, error: Exception) -> None:
        from ckptd.protocol.failure import describe  # noqa: PLC0415 - only a failing rank needs `traceback`

        job, rank, generation = self._place
        self._tell(m.Raised(job, rank, generation, describe(error).to_json()))

    def _tell(self, message: m.Message) -> None:
        if self._session is not None:
            self._session.tell(message)


def _dead_words() -> list[int]:
    """Return a control page's words for a run without agent: a step costs the same, and nothing is ever due."""
    words = [0] * (Word.PHASE + 1)
    words[_CAPTURE] = NEVER
    return words


def current_run() -> Run | None:
    """Return this process's open run, if there is one."""
    return _runs[-1] if _runs else None


def _after_fork() -> None:
    for run in _runs:
        run._forked()  # noqa: SLF001 - same module
    _runs.clear()


os.register_at_fork(after_in_child=_after_fork)
