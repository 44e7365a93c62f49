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

from ckptd.launcher.preload import in_words, shadowed, surroundings, why_unfit
from ckptd.launcher.processes import close_descriptors, die_with, flush_c_streams
from ckptd.launcher.stdio import flush_streams

_CHANGED = (ImportError, SyntaxError, AttributeError, OSError, MemoryError)
"""How an import fails that has worked in the child: its files have changed since, or what it takes is used up."""
_MAX_TRIALS = 8
"""How often what is left is tried again without a module that proved unfit."""
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

    def begin(self, names: Iterable[str]) -> None:
        """Begin a trial of those of `names` that are news, unless one is under way; see `trial`."""
        if self.trial is not None or _ALL in self._unfit or len(self._unfit) >= _MAX_TRIALS:
            return
        self._wanted = [name for name in names if self._is_news(name)]
        if self._wanted:
            self.trial = _try_in_child(self._wanted, self.folder)

    def _is_news(self, name: str) -> bool:
        return name.partition(".")[0] in self.packages and name not in sys.modules and name not in self._unfit

    def end(self) -> Learned | None:
        """Take in the end of the trial. None: another trial has begun, or this one was ended from outside."""
        assert self.trial is not None
        said = os.read(self.trial, _PIPE_BYTES)
        self.forget()
        if not said:
            return None
        unfit: dict[str, str] = json.loads(said)
        self._unfit |= unfit
        if _ALL in unfit:
            return Learned(0, 0.0, dict(self._unfit))
        if unfit:
            self.begin(self._wanted)
            if self.trial is not None:
                return None
            self._wanted = []
        began_s = time.monotonic()
        loaded = len(sys.modules)
        for name in self._wanted:
            try:
                importlib.import_module(name)
            except _CHANGED as error:
                self._unfit[name] = f"import failed: {in_words(error)}"
        gc.collect()
        gc.freeze()  # as at the start: a rank's first collection would touch, and so copy, all of it
        return Learned(len(sys.modules) - loaded, time.monotonic() - began_s, dict(self._unfit))

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
    if os.fork() == 0:
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
    unfit: dict[str, str] = {}
    for name in names:
        try:
            importlib.import_module(name)
        except BaseException as error:
            os.write(writer, json.dumps({name: f"import failed: {in_words(error)}"}).encode())
            raise
        reason = why_unfit(before)
        if reason is not None:
            unfit[name] = reason
            break
    hidden = shadowed(folder, list(sys.modules))
    if hidden:
        unfit = {_ALL: f"the script's folder has its own {', '.join(hidden)}, which they would hide"}
    os.write(writer, json.dumps(unfit).encode())
