"""Captures of one run: from an announced boundary to the seal, at once or beside the next step of training."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from time import monotonic_ns
from typing import Any, NamedTuple

from ckptd.client.framework import Binding, PendingImage, PreparedImage
from ckptd.client.guard import as_ckptd_error, as_number, say
from ckptd.client.overlap import NEVER_NS, OverlapChooser, UsualTime
from ckptd.client.session import LentSlot, Session
from ckptd.errors import AgentError, CkptdError, StateError
from ckptd.protocol import messages as m
from ckptd.protocol.page import Phase, Word

_PHASE, _WHOLE = int(Word.PHASE), int(Word.WHOLE)
_FINAL_SLOT_DEADLINE_S = 120.0
_POLL_S = 0.005


class _Target(NamedTuple):
    """A prepared image, where it goes, and what else its seal says."""

    step: int
    begin_ns: int
    image: PreparedImage
    slot: LentSlot
    view: memoryview
    values: Mapping[str, Any]

    def release(self) -> None:
        """Let go of the slot's memory; it stays mapped while a traceback holds it, or a lock on its pages."""
        with contextlib.suppress(BufferError):
            self.view.release()


class _Pending(NamedTuple):
    """An image that is still being copied."""

    target: _Target
    copy: PendingImage
    stall_ns: int


class Capturing:
    """Takes one image at a time. Every method may raise; the run's guard decides what comes of it.

    While an image is pending, `settle` has to be called before an optimizer steps and before the slots change.
    """

    def __init__(self, session: Session, binding: Binding, chooser: OverlapChooser, values: Mapping[str, Any]) -> None:
        """Capture what `binding` holds into the slots of `session`; `values` are what was reported last."""
        self.captured_step = -1
        self._session = session
        self._binding = binding
        self._chooser = chooser
        self._values = values
        self._usual_time = UsualTime()
        self._pending: _Pending | None = None
        self._steps_beside = 0
        """Steps that are over since the pending image was begun."""
        self._settling = threading.RLock()
        self._last_seal: m.Seal | None = None

    @property
    def waiting(self) -> bool:
        """Whether the next boundary or optimizer's step matters, whichever comes first."""
        return self._pending is not None or self._usual_time.open

    @property
    def due_ns(self) -> int:
        """From when on `boundary` has to be called at a boundary."""
        if self._pending is not None:
            return 0
        return self._usual_time.due_ns if self._chooser.measures else NEVER_NS

    def boundary(self, now_ns: int) -> bool:
        """Do what is due at the boundary between two steps, before anything else is done there.

        Returns whether an image was settled, as `before_optimizer_step` and `settle` do.
        """
        pending = self._pending
        if pending is None:
            if self._chooser.measures:
                self._usual_time.boundary(now_ns)
            return False
        self._steps_beside += 1
        # What is not complete goes on: who would change it has to wait.
        return pending.copy.done and self.settle()

    def before_optimizer_step(self) -> bool:
        """Do what is due before an optimizer changes anything; may come from any thread that steps one."""
        self._usual_time.optimizer_step(monotonic_ns())
        return self.settle(in_step=True)

    # --- one capture ------------------------------------------------------------------------------------------

    def capture(self, step: int) -> None:
        """Capture an announced step, or begin to; a step that can't be captured is told to the agent as missed."""
        overlapped = self._chooser.choose()
        with self._telling(step):
            self.settle()
            with self._stalled():
                target = self._target(step, patience_s=0.0)
                self._usual_time.captured(target.begin_ns)
                if overlapped:
                    # They are read when the image is sealed: on a device, reading one waits for it.
                    target = target._replace(values={name: _copied(value) for name, value in target.values.items()})
                    copy = target.image.begin(target.view)
                    if copy is not None:
                        self._steps_beside = 0
                        self._pending = _Pending(target, copy, monotonic_ns() - target.begin_ns)
                        return
                else:
                    target.image.write(target.view)
                self._seal(target, waits_since_ns=target.begin_ns)
        if self._chooser.measures:
            end_ns = monotonic_ns()
            self._chooser.record(overlapped=overlapped, cost_s=(end_ns - target.begin_ns) / 1e9)
            self._usual_time.boundary(end_ns)

    def missed(self, step: int, at_step: int) -> None:
        """Tell the agent that an announced step was seen too late."""
        self._chooser.choose()  # other ranks try a way at this step
        self._session.tell(m.Missed(step, at_step))

    def settle(self, *, in_step: bool = False) -> bool:
        """Wait until a pending image is complete, and seal it; without one, do nothing and return False.

        `in_step` tells that an optimizer is about to step, not that a step is over.

        An image whose tensors were changed under the copy is void: the agent learns of it, and captures are copied at
        the boundary from then on. That is no fault. Any other error is one, and has the same consequence.
        """
        if self._pending is None:
            return False
        with self._settling:
            pending = self._pending
            if pending is None:
                return False
            with self._stalled():
                self._settle(pending, in_step=in_step)
        return True

    def _settle(self, pending: _Pending, *, in_step: bool) -> None:
        begin_ns, target = monotonic_ns(), pending.target
        try:
            pending.copy.finish()
        except StateError as error:
            self._void(target, error)
            say(f"the checkpoint of step {target.step} is void, later ones are copied between steps: {error}")
            return
        except BaseException as error:
            if isinstance(error, Exception):  # else it was interrupted, and is to be waited for again
                self._void(target, error)
            raise
        if self._pending is not pending:
            return  # a hook that ran in here has sealed it
        self._pending = None
        with self._telling(target.step):
            self._seal(target, waits_since_ns=begin_ns - pending.stall_ns)
        usual_ns = self._usual_time.usual_ns(self._steps_beside, until_optimizer=in_step)
        if self._chooser.measures and usual_ns is not None:
            self._chooser.record(overlapped=True, cost_s=(monotonic_ns() - target.begin_ns - usual_ns) / 1e9)

    def _void(self, target: _Target, error: BaseException) -> None:
        self._pending = None
        self._chooser.refuse()
        target.release()
        self._tell_missed(target.step, error)

    def last(self, step: int) -> float:
        """Capture the step at which the job stops, copied at the boundary; wait for a slot, and return the seconds."""
        with self._telling(step):
            self.settle()
            with self._stalled(Phase.LEAVING):
                target = self._target(step, patience_s=_FINAL_SLOT_DEADLINE_S)
                target.image.write(target.view)
                self._seal(target, waits_since_ns=target.begin_ns)
        return (monotonic_ns() - target.begin_ns) / 1e9

    def finish(self, step: int) -> None:
        """Capture the last step, copied at the boundary, unless there is nothing to capture since the last time."""
        self._session.training_is_over()
        self.settle()
        if (step > self.captured_step or self._source_lost) and step > 0:
            with self._stalled(Phase.LEAVING):
                target = self._target(step, patience_s=_FINAL_SLOT_DEADLINE_S)
                target.image.write(target.view)
                self._seal(target, waits_since_ns=target.begin_ns, final=True)
        elif self._last_seal is not None:
            self._seal_again(self._last_seal)

    @property
    def _source_lost(self) -> bool:
        """Whether what was restored, and not captured since, may have been in the memory of a dead agent alone."""
        return self._last_seal is None and self._session.replaced

    def finish_again(self, step: int) -> None:
        """Capture the last step for another agent than the one that has heard of its end, if that may lack it."""
        if self._source_lost:
            self.finish(step)

    def reserve(self, step: int) -> None:
        """Get slots that fit what would be captured now, unless the present ones do."""
        self._fitting(self._prepare(step))

    # --- its parts --------------------------------------------------------------------------------------------

    def _prepare(self, step: int) -> PreparedImage:
        return self._binding.prepare(step, whole=bool(self._session.page.words[_WHOLE]))

    def _fitting(self, image: PreparedImage) -> PreparedImage:
        if not self._session.fits(image.image_bytes):
            self.settle()  # slots that are not lent again are unmapped
            self._session.reserve(image.image_bytes)
        return image

    def _target(self, step: int, *, patience_s: float) -> _Target:
        begin_ns = monotonic_ns()
        image = self._fitting(self._prepare(step))
        slot = self._session.free_slot(image.image_bytes)
        if slot is None and patience_s:
            self._session.tell(m.Request(step))  # a single slot holds what is committed until it is asked for
        while slot is None and monotonic_ns() - begin_ns < patience_s * 1e9:
            time.sleep(_POLL_S)
            self._session.look()  # another agent may have to come first
            slot = self._session.free_slot(image.image_bytes)
        if slot is None:
            raise AgentError("every slot is busy")
        return _Target(step, begin_ns, image, slot, slot.view, dict(self._values))

    def _seal(self, target: _Target, *, waits_since_ns: int, final: bool = False) -> None:
        target.release()
        witness = dict(target.image.witness())
        values = numbers(target.values)
        seconds = (monotonic_ns() - waits_since_ns) / 1e9
        seal = m.Seal(target.step, target.slot.number, target.image.image_bytes, seconds, values, final, witness)
        self._session.page.seal(target.slot.number)
        self._session.tell(seal)
        self._last_seal = seal
        self.captured_step = target.step

    def _seal_again(self, last: m.Seal) -> None:
        """Say that the last step's seal is final: should another rank have missed that step, it is needed after all."""
        if self._session.page.slot_free(last.slot):
            self._session.page.seal(last.slot)
        self._session.tell(
            m.Seal(last.step, last.slot, last.image_bytes, last.seconds, last.values, final=True, witness=last.witness)
        )

    @contextlib.contextmanager
    def _telling(self, step: int) -> Iterator[None]:
        """Whatever it fails with, the agent must not wait for this step."""
        try:
            yield
        except BaseException as error:
            self._tell_missed(step, error)
            raise

    def _tell_missed(self, step: int, error: BaseException) -> None:
        with contextlib.suppress(CkptdError):
            self._session.tell(m.Missed(step, step, as_ckptd_error(error).to_json()))

    @contextlib.contextmanager
    def _stalled(self, phase: Phase = Phase.CAPTURING) -> Iterator[None]:
        """Show that training waits."""
        words = self._session.page.words
        words[_PHASE] = phase
        try:
            yield
        finally:
            words[_PHASE] = Phase.TRAINING

    # --- the end ----------------------------------------------------------------------------------------------

    def drop(self) -> None:
        """Wait for a pending image and forget it: nobody would hear of it any more."""
        with self._settling:
            pending, self._pending = self._pending, None
            if pending is not None:
                with contextlib.suppress(StateError):
                    pending.copy.finish()
                pending.target.release()

    def forget(self) -> None:
        """Forget a pending image without waiting: in a forked child, where nobody copies."""
        pending, self._pending = self._pending, None
        if pending is not None:
            target = pending.target
            del pending
            target.release()


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return what of reported values a manifest can hold."""
    found: dict[str, float] = {}
    for name, value in values.items():
        number = as_number(value)
        if number is not None and number - number == 0:  # JSON has no NaN and no infinity
            found[name] = number
    return found


def _copied(value: Any) -> Any:
    """Return a copy of a tensor, which the next step may change in place; anything else is as it is."""
    clone = getattr(value, "clone", None)
    return value if clone is None else clone()
