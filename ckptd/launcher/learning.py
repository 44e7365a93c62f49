"""Learning from the ranks what else to preload: what they have imported of the preloaded packages meanwhile.

Packages like transformers, and torch itself, import most of their parts when somebody first needs them. To preload
such a package is cheap and of little use: each rank of each generation would import its parts anew. So a rank says
what it has imported, and the launcher imports that too, before the next fork.

What was preloaded can't be undone, and ranks live meanwhile, so this process can't be replaced by a new one as at its
start. A forked child tries first, and what it finds unfit to be forked is left to the ranks.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from ckptd.launcher.preload import in_words, shadowed, surroundings, why_unfit
from ckptd.launcher.processes import close_descriptors, die_with, flush_c_streams, fork
from ckptd.launcher.stdio import flush_streams

_CHANGED = (ImportError, SyntaxError, AttributeError, OSError, MemoryError)
"""How an import fails that has worked in the child: its files have changed since, or what it takes is used up."""
_MAX_UNFIT = 8
"""How many modules may prove unfit, at the price of a trial each, until what comes after them is left alone."""
NICENESS = 10
"""A trial takes its time beside training, not from it."""
_PIPE_BYTES = 65536
_ALL = "*"
"""Stands for all modules of a trial."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What came of it: how many modules are loaded now that were not, in which time, and why others are not."""

    modules: int
    seconds: float
    skipped: dict[str, str]


@dataclass(slots=True)
class Learner:
    """Tries in a child what ranks have imported of `packages`, then imports it here.

    `trial` is the descriptor that becomes readable at the end of the trial that is under way, if there is one.
    """

    packages: frozenset[str]
    folder: str
    """The script's, whose own modules none of another package may hide."""
    trial: int | None = None
    _wanted: list[str] = field(default_factory=list)
    _unfit: dict[str, str] = field(default_factory=dict)
    _modules: int = 0
    _seconds: float = 0.0

    def begin(self, names: Iterable[str]) -> None:
        """Begin a trial of those of `names` that are news, unless one is under way; see `trial`."""
        if self.trial is None:
            self._modules, self._seconds = 0, 0.0
            self._go_on(names)

    def _go_on(self, names: Iterable[str]) -> None:
        if _ALL in self._unfit or len(self._unfit) >= _MAX_UNFIT:
            return
        self._wanted = [name for name in names if self._is_news(name)]
        if self._wanted:
            self.trial = _try_in_child(self._wanted, self.folder)

    def _is_news(self, name: str) -> bool:
        return name.partition(".")[0] in self.packages and name not in sys.modules and name not in self._unfit

    def end(self) -> Learned | None:
        """Take in the end of the trial. None: another has begun, or nothing came of it because it has died."""
        assert self.trial is not None
        said = os.read(self.trial, _PIPE_BYTES)
        self.forget()
        if not said:
            return self._learned() if self._modules else None
        unfit: dict[str, str] = json.loads(said)
        self._unfit |= unfit
        if _ALL not in unfit:
            # What comes after the one that is unfit was not tried, and what comes before it need not be tried again.
            fit = list(takewhile(lambda name: name not in unfit, self._wanted))
            self._import(fit)
            self._go_on(self._wanted[len(fit) + 1 :])
        return self._learned() if self.trial is None else None

    def _learned(self) -> Learned:
        return Learned(self._modules, self._seconds, dict(self._unfit))

    def _import(self, names: Iterable[str]) -> None:
        began_s = time.monotonic()
        loaded = len(sys.modules)
        for name in names:
            try:
                importlib.import_module(name)
            except _CHANGED as error:
                self._unfit[name] = f"import failed: {in_words(error)}"
        gc.collect()
        gc.freeze()  # as at the start: a rank's first collection would touch, and so copy, all of it
        self._modules += len(sys.modules) - loaded
        self._seconds += time.monotonic() - began_s

    def forget(self) -> None:
        """Let go of the trial."""
        if self.trial is not None:
            os.close(self.trial)
            self.trial = None


def _try_in_child(names: Sequence[str], folder: str) -> int:
    """Import `names` in a forked child; return where that says which was unfit, in JSON, or nothing if it died."""
    reader, writer = os.pipe()
    parent_pid = os.getpid()
    flush_streams()
    flush_c_streams()
    # A signal that met the child before it has its own handlers would reach the parent through a shared socket.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    if fork() == 0:
        try:
            die_with(parent_pid)
            close_descriptors(but=writer)
            signal.set_wakeup_fd(-1)
            os.nice(NICENESS)
            _try(names, folder, writer)
        finally:
            os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.close(writer)
    return reader


def _try(names: Sequence[str], folder: str, writer: int) -> None:
    """Import until one is unfit, and write down which and why."""
    before = surroundings()
    for name in names:
        try:
            importlib.import_module(name)
        except BaseException as error:
            _write(writer, {name: f"import failed: {in_words(error)}"}, folder)
            raise
        reason = why_unfit(before)
        if reason is not None:
            _write(writer, {name: reason}, folder)
            return
    _write(writer, {}, folder)


def _write(writer: int, unfit: dict[str, str], folder: str) -> None:
    hidden = shadowed(folder, list(sys.modules))
    if hidden:
        unfit = {_ALL: f"the script's folder has its own {', '.join(hidden)}, which they would hide"}
    os.write(writer, json.dumps(unfit).encode())
