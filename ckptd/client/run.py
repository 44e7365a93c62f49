"""A run: what training code holds. `step()` costs one integer comparison unless something is due."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from time import monotonic_ns
from types import TracebackType
from typing import Any, Self

from ckptd.client.capturing import Capturing
from ckptd.client.framework import Binding
from ckptd.client.guard import Guard, attempt
from ckptd.client.leaving import wait_for_all
from ckptd.client.overlap import OverlapChooser
from ckptd.client.reporting import Reporting, SkipData, spread
from ckptd.client.restoring import Restored, restore
from ckptd.client.sections import Section, Sections, deadline_s
from ckptd.client.session import Session
from ckptd.errors import RESUMABLE, StateError
from ckptd.protocol import inherited
from ckptd.protocol import messages as m
from ckptd.protocol.page import NEVER, PAGE_BYTES, Phase, Word

_STEP, _BEAT, _PHASE, _CAPTURE = int(Word.STEP), int(Word.BEAT_NS), int(Word.PHASE), int(Word.CAPTURE_STEP)
_WAITED = int(Word.WAITED_NS)
_LAST_STEP, _LEAVE = int(Word.LAST_STEP), int(Word.LEAVE)
_LOOK_EVERY_NS = 10**8
"""How often a rank looks whether its agent is still there: at a word of the control page, and nothing else mostly."""
_runs: list[Run] = []


class Run:
    """One rank's part in a job, from `ckptd.attach` to the end of its block.

    `generation` counts the job's incarnations from 1. `restored` is None after a fresh start. `state` holds the
    attached objects by name; a value that can't be filled in place, such as an int, is read and written there.
    `skipped` are the steps still to come that are to be skipped, since the job has stepped back from what they led to.
    """

    def __init__(self, *, strict: bool = False, overlap: str = "auto", skip_data: SkipData | None = None) -> None:
        self.generation = 1
        self.restored: Restored | None = None
        self.skipped: frozenset[int] = frozenset()
        self.state: MutableMapping[str, Any] = {}
        self._overlap = overlap
        self._skip_data = skip_data
        self._reporting: Reporting | None = None
        self._session: Session | None = None
        self._binding: Binding | None = None
        self._capturing: Capturing | None = None
        self._sections = Sections()
        self._guard = Guard(strict=strict, on_open=self._unprotect)
        self._words: Any = _dead_words()
        self._step = 0
        self._look_ns = 0
        self._due_ns = 0
        self._handled = NEVER
        self._values: dict[str, Any] = {}
        self._place = ("", 0, 0)
        self._harm: Any = None
        """What `ckptctl chaos` may do to this rank, in a job that allows it."""
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
        """Say that one training step is over. Here, and nowhere else, ckptd may capture.

        In a job that is told to stop, the last one ends with `SystemExit`, once every rank's state is captured: blocks
        are left in order and nothing after the loop takes the training for finished. Only ranks that ckptd has started
        end like this.
        """
        step = self._step + 1
        self._step = step
        words = self._words
        words[_STEP] = step
        words[_BEAT] = now_ns = monotonic_ns()
        if step >= words[_CAPTURE] or now_ns >= self._due_ns:
            self._boundary(step, now_ns)

    def report(self, **values: Any) -> None:
        """Report metrics of the step that is under way, such as `loss`, before `step()` says that it is over.

        Numbers and one-element tensors. The next checkpoint's manifest carries them, and of the one that the job
        watches (`numbers`) each is judged. Nothing waits for a tensor on a GPU: it is read when it is there.
        """
        for name, value in values.items():
            detach = getattr(value, "detach", None)
            self._values[name] = value if detach is None else detach()  # drop the graph, keep the number
        reporting = self._reporting
        if reporting is not None and reporting.metric in values:
            value = values[reporting.metric]
            if type(value) is float:
                reporting.write(self._step + 1, value)
            else:
                self._guard.aside("a report", reporting.report, self._step + 1, self._values[reporting.metric])
                if reporting.waiting:
                    self._due_ns = 0

    def section(self, name: str, deadline: str | float | None = None) -> Section:
        """Say that this rank may be at something for long without finishing a step: `with run.section("eval", "20m")`.

        Nobody calls it hung before `deadline` (seconds, or text like "20m"), nor a rank that waits for it; without
        one the job's `hang.ceiling` holds. A section in another one ends with that at the latest. It decorates a
        function as well. A deadline that can't be read counts as none, and is said, or raised with `strict`.
        """
        wanted = None if deadline is None else self._guard.aside("a section's deadline", deadline_s, deadline)
        return Section(self, name, wanted)

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
    def stopping(self) -> bool:
        """Whether the job is told to stop, and this step or one of the next is its last: no time for long work."""
        return bool(self._words[_LAST_STEP])

    @property
    def protected(self) -> bool:
        """Whether checkpoints are being taken."""
        return self._session is not None

    def _enter(self, name: str, deadline_s: float | None) -> object:
        return self._guard.aside("a section", self._sections.enter, self._words, name, deadline_s)

    def _leave(self, section: object) -> None:
        self._sections.leave(self._words, section)

    # --- boundaries -------------------------------------------------------------------------------------------

    def _boundary(self, step: int, now_ns: int) -> None:
        capturing = self._capturing
        if capturing is None:
            self._due_ns = NEVER
            self._unbind()
            return
        if self._harm is not None:
            self._harm.boundary(self._words, step, self.state)  # not guarded: it is meant to raise
        reporting = self._reporting
        if reporting is not None and reporting.waiting:
            self._guard.aside("a report", reporting.boundary)
        if now_ns >= capturing.due_ns:
            self._guarded("a copy beside training", capturing.boundary, now_ns)
        if now_ns >= self._look_ns:
            first, self._look_ns = self._look_ns == 0, now_ns + _LOOK_EVERY_NS
            if first:
                self._guarded("preparing slots", self._first_step, capturing, step)
            elif self._session is not None:
                self._guarded("a look at the agent", self._session.look)
        if step >= self._words[_CAPTURE]:
            self._announced(capturing, step)
        if self._capturing is not None:
            always = self._harm is not None or (reporting is not None and reporting.waiting)
            self._due_ns = 0 if always else min(self._look_ns, capturing.due_ns)

    def _announced(self, capturing: Capturing, step: int) -> None:
        """Capture the announced step, or say that this is a later one; leave when the agent says so."""
        wanted = self._words[_CAPTURE]
        if wanted != self._handled and not self._words[_LEAVE]:
            self._handled = wanted
            if step != wanted:
                self._guarded("a message", capturing.missed, wanted, step)
            elif step == self._words[_LAST_STEP]:
                self._guarded("the last capture", self._capture_last, capturing, step)
            else:
                self._guarded("a capture", capturing.capture, step)
        if self._words[_LEAVE]:
            raise SystemExit(RESUMABLE)

    def _guarded(self, what: str, work: Callable[..., object], *arguments: Any) -> None:
        """Do something that may fail; a connection that is lost with it is lost for good."""
        self._guard.run(what, work, *arguments)
        if self._session is not None and self._session.lost:
            self._guard.trip("the connection to the agent is lost")

    def _first_step(self, capturing: Capturing, step: int) -> None:
        self._tell(m.Stepped(step, time.monotonic()))
        # An optimizer has its state only now: get slots that fit before the first capture needs them.
        capturing.reserve(step)
        if self._place[1] == 0 and inherited.packages:
            self._tell_imports()

    def _tell_imports(self) -> None:
        """Say what was imported since the fork, so that the ranks of the next generation are forked with it."""
        new = [name for name in sys.modules if name not in inherited.modules]
        wanted = [name for name in new if name.partition(".")[0] in inherited.packages]
        if wanted:
            self._tell(m.Imported(wanted))

    def _capture_last(self, capturing: Capturing, step: int) -> None:
        session = self._session
        assert session is not None  # a run that captures has one
        took_s = capturing.last(step)
        wait_for_all(self._words, took_s, session.look)

    def _waited(self, passed_ns: int) -> None:
        """Add to what this rank has waited for others; the framework calls this, from whichever thread has waited."""
        words = self._words
        words[_WAITED] = words[_WAITED] + passed_ns

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
        self._skip(session.numbers.get("skipped", ()))
        if session.numbers.get("metric"):
            self._reporting = Reporting(session.page, binding, session.numbers["metric"])
        if chooser.overlaps:
            binding.before_optimizer_steps(self._before_optimizer_step)
        binding.count_waits(self._waited)
        self._look_ns = self._due_ns = 0
        if words[Word.HARM_ALLOWED]:
            from ckptd.client.chaos import SelfHarm  # noqa: PLC0415 - other jobs need none of it

            self._harm = SelfHarm()
        session.trains()
        words[_PHASE] = Phase.TRAINING

    def _skip(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Tell the user's code which steps to come are to be skipped; what it raises is raised."""
        self.skipped = spread(ranges)
        if self._skip_data is not None:
            for first, last in ranges:
                self._skip_data(first, last)

    def close(self) -> None:
        """End the run after its last step: a final capture, and a wait until it is durable."""
        try:
            if self._capturing is not None:
                self._guarded("a copy beside training", self._capturing.settle)
            if self._capturing is not None and self._session is not None:
                self._session.patient = True
                self._guard.run("the last checkpoint", self._finish, self._capturing)
        finally:
            self._end()

    def _finish(self, capturing: Capturing) -> None:
        if self._reporting is not None:
            self._reporting.boundary(wait=True)
        capturing.finish(self._step)
        self._words[_PHASE] = Phase.LEFT
        if self._session is not None:
            self._session.leave(self._step, lambda: capturing.finish_again(self._step))

    def _unprotect(self) -> None:
        """Let go of the agent. The binding stays until the next boundary: this may run in a hook of the framework's."""
        self._words = _dead_words()
        self._due_ns = 0
        self._reporting = None
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
        self._binding = self._reporting = None
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
            if self._reporting is not None:
                attempt("a report", self._reporting.boundary)
            if isinstance(error, (Exception, SystemExit)):
                attempt("reporting the exception", self._report_exception, error)
        finally:
            self._end()

    def _report_exception(self, error: Exception | SystemExit) -> None:
        from ckptd.protocol.failure import describe_end, is_failure  # noqa: PLC0415 - only this rank needs `traceback`

        job, rank, generation = self._place
        if is_failure(error):
            self._tell(m.Raised(job, rank, generation, describe_end(error).to_json()))

    def _tell(self, message: m.Message) -> None:
        if self._session is not None:
            self._session.tell(message)


def _dead_words() -> list[int]:
    """Return a control page's words for a run without agent: a step costs the same, and nothing is ever due."""
    words = [0] * (PAGE_BYTES // 8)
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
