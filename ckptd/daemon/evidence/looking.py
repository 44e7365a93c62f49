"""Looks at every rank at once: its state, its stack, and whether it computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from ckptd.core.policy.activities import Frame, Look
from ckptd.daemon.evidence import kernel
from ckptd.daemon.evidence.order import RankView
from ckptd.daemon.evidence.pieces import Part, text_piece
from ckptd.daemon.evidence.stacks import Stacks, find_py_spy, main_thread, read_stacks, show, source_reader, with_source

_WATCH_S = 0.25
"""Over how long it is measured whether a rank computes."""


class Looks:
    """What is seen of the ranks; each is there from the first moment on, and gets better while it is looked at."""

    def __init__(self, ranks: Sequence[RankView], until_s: float) -> None:
        """Look at `ranks` until monotonic `until_s` at most."""
        self._ranks = ranks
        self._until_s = until_s
        self._read = source_reader()
        self._stacks = {view.rank: Stacks(problem="it had not been read when time was up") for view in ranks}
        self.found: dict[int, Look] = {}
        for view in ranks:
            seen = kernel.thread(view.pid)
            self.found[view.rank] = _look(view, seen, 0.0, (), holds_gil=False)

    def look(self) -> Part:
        """Look at all of them side by side."""
        program = find_py_spy()
        threads = [
            threading.Thread(target=self._look_at, args=(view, program), daemon=True, name=f"ckptd-look-{view.rank}")
            for view in self._ranks
        ]
        for item in threads:
            item.start()
        for item in threads:
            item.join(max(0.0, self._until_s - time.monotonic()))
        return self._part()

    def _look_at(self, view: RankView, program: str | None) -> None:
        before, began_s = kernel.thread(view.pid), time.monotonic()
        if not before.state:
            self._stacks[view.rank] = Stacks(problem="the process has ended")
            return
        self._stacks[view.rank] = stacks = read_stacks(view.pid, self._until_s, program)
        time.sleep(max(0.0, min(began_s + _WATCH_S, self._until_s) - time.monotonic()))
        after, passed_s = kernel.thread(view.pid), time.monotonic() - began_s
        busy = min(1.0, max(0.0, after.wanted_s - before.wanted_s) / passed_s)
        main = main_thread(stacks, view.pid)
        frames = () if main is None else with_source(main.frames, self._read)
        holds_gil = main is not None and main.holds_gil
        self.found[view.rank] = _look(view, after, busy, frames, holds_gil=holds_gil)

    def _part(self) -> Part:
        shown = [show(view.rank, view.pid, self._stacks[view.rank], self._read) for view in self._ranks]
        missing = [
            f"Python stack of rank {view.rank}: {problem}"
            for view in self._ranks
            if (problem := self._stacks[view.rank].problem)
        ]
        if len(missing) == len(self._ranks):
            return Part((), tuple(missing))
        about = "the Python stack of every thread of every rank, innermost call last"
        return Part((text_piece("stacks.txt", "\n".join(shown), about),), tuple(missing))


def _look(view: RankView, seen: kernel.Thread, busy: float, stack: tuple[Frame, ...], *, holds_gil: bool) -> Look:
    step = None if view.page is None else view.page.get("STEP")
    return Look(view.rank, view.pid, seen.state, busy, seen.wchan, stack, holds_gil=holds_gil, step=step)
