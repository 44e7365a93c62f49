"""A run: what training code holds. `step()` costs one integer comparison unless something is due."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, MutableMapping
from time import monotonic_ns
from types import TracebackType
from typing import Any, NamedTuple, Self

from ckptd.client.framework import Binding
from ckptd.client.guard import Guard, as_ckptd_error
from ckptd.client.session import Session, restore_failed
from ckptd.errors import AgentError, CkptdError, DamagedError, StateError
from ckptd.protocol import messages as m
from ckptd.protocol.page import NEVER, Phase, Word

_STEP, _BEAT, _PHASE, _CAPTURE = int(Word.STEP), int(Word.BEAT_NS), int(Word.PHASE), int(Word.CAPTURE_STEP)
_FINAL_SLOT_DEADLINE_S = 120.0
_LOOK_EVERY_NS = 5 * 10**9
"""How often a rank looks whether its agent is still there; it costs a system call."""
_runs: list[Run] = []


class Restored(NamedTuple):
    """What a run began with: which checkpoint, from where, and how long filling the objects took."""

    generation: int
    step: int
    tier: str
    seconds: float


class Run:
    """One rank's part in a job, from `ckptd.attach` to the end of its block.

    `generation` counts the job's incarnations from 1. `restored` is None after a fresh start. `state` holds the
    attached objects by name; a value that can't be filled in place, such as an int, is read and written there.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.generation = 1
        self.restored: Restored | None = None
        self.state: MutableMapping[str, Any] = {}
        self._session: Session | None = None
        self._binding: Binding | None = None
        self._guard = Guard(strict=strict, on_open=self._unprotect)
        self._words: Any = _dead_words()
        self._step = 0
        self._look_ns = 0
        self._handled = NEVER
        self._captured_step = -1
        self._last_seal: m.Seal | None = None
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
        if step >= words[_CAPTURE] or now_ns >= self._look_ns:
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
        if self._session is None:
            self._look_ns = NEVER
            return
        if now_ns >= self._look_ns:
            first, self._look_ns = self._look_ns == 0, now_ns + _LOOK_EVERY_NS
            if first:
                self._guarded("preparing slots", self._first_step, step)
            else:
                self._guarded("a look at the agent", self._session.check)
        wanted = self._words[_CAPTURE]
        if step < wanted or wanted == self._handled:
            return
        self._handled = wanted
        if step == wanted:
            self._guarded("a capture", self._capture_or_tell, step)
        else:
            self._guarded("a message", self._tell, m.Missed(wanted, step))

    def _guarded(self, what: str, work: Callable[..., None], *arguments: Any) -> None:
        """Do something that may fail; a connection that is lost with it is lost for good."""
        self._guard.run(what, work, *arguments)
        if self._session is not None and self._session.lost:
            self._guard.trip("the connection to the agent is lost")

    def _first_step(self, step: int) -> None:
        self._tell(m.Stepped(step, time.monotonic()))
        session, binding = self._need_session(), self._need_binding()
        # An optimizer has its state only now: get slots that fit before the first capture needs them.
        needed_bytes = binding.prepare().image_bytes
        if not session.fits(needed_bytes):
            session.reserve(needed_bytes)

    def _capture_or_tell(self, step: int) -> None:
        try:
            self._capture(step, final=False)
        except BaseException as error:  # whatever it was, the agent must not wait for this step
            with contextlib.suppress(CkptdError):
                self._tell(m.Missed(step, step, as_ckptd_error(error).to_json()))
            raise

    def _capture(self, step: int, *, final: bool) -> None:
        session, binding = self._need_session(), self._need_binding()
        begin_s = time.monotonic()
        self._words[_PHASE] = Phase.CAPTURING
        try:
            image = binding.prepare()
            if not session.fits(image.image_bytes):
                session.reserve(image.image_bytes)
            slot = session.free_slot(image.image_bytes)
            end_s = begin_s + _FINAL_SLOT_DEADLINE_S
            while slot is None and final and time.monotonic() < end_s:
                time.sleep(0.005)
                slot = session.free_slot(image.image_bytes)
            if slot is None:
                raise AgentError("every slot is busy")
            view = slot.view
            image.write(view)
            view.release()  # after a fault it goes with the traceback, which may hold parts of it
            numbers = self._numbers()
            session.page.seal(slot.number)
            took_s = time.monotonic() - begin_s
            self._last_seal = m.Seal(step, slot.number, image.image_bytes, took_s, numbers, final)
            session.tell(self._last_seal)
            self._captured_step = step
        finally:
            self._words[_PHASE] = Phase.TRAINING

    def _numbers(self) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for name, value in self._values.items():
            try:
                number = float(value)
            except (TypeError, ValueError, ArithmeticError, RuntimeError):
                continue  # not a number: nothing a manifest could hold
            if number - number == 0:  # JSON has no NaN and no infinity
                numbers[name] = number
        return numbers

    # --- beginning and end ------------------------------------------------------------------------------------

    def _begin(self, session: Session, binding: Binding, place: tuple[str, int]) -> None:
        """Take over a joined session: lend slots and restore what is offered. Raises what `attach` should raise."""
        self._session, self._binding = session, binding
        self._place = (*place, session.generation)
        self.state = binding.state
        self.generation = session.generation
        self._words = session.page.words
        self._look_ns = 0
        _runs.append(self)
        session.reserve(binding.prepare().image_bytes)
        if session.offer is not None:
            self._restore(session, binding)
        self._words[_PHASE] = Phase.TRAINING

    def _restore(self, session: Session, binding: Binding) -> None:
        offer = session.offer
        if offer is None:
            return
        self._words[_PHASE] = Phase.RESTORING
        begin_s = time.monotonic()
        image = session.slots[int(offer["slot"])].view[: int(offer["image_bytes"])]
        try:
            binding.restore(image, offer["digests"])
        except (StateError, DamagedError) as error:
            session.tell(restore_failed(offer, error))
            raise
        image.release()
        seconds = time.monotonic() - begin_s
        step = int(offer["step"])
        self.restored = Restored(int(offer["generation"]), step, str(offer["tier"]), seconds)
        self._step = self._captured_step = step
        self._words[_STEP] = step
        session.tell(m.Restored(self.restored.generation, step, seconds))

    def close(self) -> None:
        """End the run after its last step: a final capture, and a wait until it is durable."""
        try:
            if self._session is not None:
                self._guard.run("the last checkpoint", self._finish)
        finally:
            self._unprotect()

    def _finish(self) -> None:
        session = self._need_session()
        if self._step > self._captured_step and self._step > 0:
            self._capture(self._step, final=True)
        elif self._last_seal is not None:
            self._seal_again(session, self._last_seal)
        self._words[_PHASE] = Phase.LEFT
        session.leave(self._step)

    def _seal_again(self, session: Session, last: m.Seal) -> None:
        """Say that the last step's seal is final: should another rank have missed that step, it is needed after all."""
        if session.page.slot_free(last.slot):
            session.page.seal(last.slot)
        session.tell(m.Seal(last.step, last.slot, last.image_bytes, last.seconds, last.values, final=True))

    def _unprotect(self) -> None:
        self._words = _dead_words()
        session, self._session = self._session, None
        if self in _runs:
            _runs.remove(self)
        if session is not None:
            session.close()

    def _forked(self) -> None:
        """Let go of the session in a forked child: it belongs to the parent."""
        self._words = _dead_words()
        session, self._session = self._session, None
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
        if error is not None and isinstance(error, Exception):
            with contextlib.suppress(CkptdError):  # also when strict: the exception on its way matters more
                self._guard.run("reporting the exception", self._report_exception, error)
        self._unprotect()

    def _report_exception(self, error: Exception) -> None:
        from ckptd.protocol.failure import describe  # noqa: PLC0415 - only a failing rank needs `traceback`

        job, rank, generation = self._place
        self._tell(m.Raised(job, rank, generation, describe(error).to_json()))

    def _tell(self, message: m.Message) -> None:
        if self._session is not None:
            self._session.tell(message)

    def _need_session(self) -> Session:
        if self._session is None:
            raise AgentError("this run has no agent any more")
        return self._session

    def _need_binding(self) -> Binding:
        if self._binding is None:
            raise StateError("this run has no objects attached")
        return self._binding


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
