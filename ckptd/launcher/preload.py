"""Importing what every rank needs before the first fork, and refusing whatever a fork would break.

A fork copies one thread and every descriptor. A module that has started a thread would be a module without its
thread in each rank (with that thread's locks held for ever); one that has opened a device, a socket or a log file
would share it between all ranks. Neither can be undone from outside, so the launcher starts anew without the module
and says why; the ranks import it themselves, as they would under plain Python.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.machinery import BuiltinImporter, FrozenImporter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ckptd.launcher.processes import current_folder, fork, has_children, open_descriptors
from ckptd.protocol.failure import describe

StartOver = Callable[[str, str], NoReturn]
_TASKS = Path("/proc/self/task")
_SAFE_TASKS = frozenset({"jemalloc_bg_thd"})
"""Threads, by the names that they give themselves, whose library holds all its locks across a fork and works in the
child without them. This one is of the allocator jemalloc, which pyarrow brings along and some jobs run under."""
_REASON_CHARS = 500
_SETTLE_S = 0.2
"""How long a thread that is on its way out may take to leave the process table."""


class Surroundings(NamedTuple):
    """What of this process an import has to leave as it is."""

    descriptors: dict[int, str]
    folder: str
    handlers: dict[int, Any]
    streams: tuple[Any, ...]


def surroundings() -> Surroundings:
    """Return what they are now."""
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return Surroundings(open_descriptors(), current_folder(), handlers, (sys.stdin, sys.stdout, sys.stderr))


def preload(names: Sequence[str], unfit: StartOver) -> tuple[list[str], dict[str, str]]:
    """Import `names` in order; return those that are loaded now, and why others are not.

    `unfit(name, reason)` replaces this process by one that leaves `name` out.
    """
    loaded: list[str] = []
    missing: dict[str, str] = {}
    for name in names:
        before = surroundings()
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                unfit(name, f"import failed: {in_words(error)}")
            # Nothing of it was executed, so there is nothing to clean up.
            missing[name] = f"no module named {error.name}"
            continue
        except BaseException as error:
            # Any exception may come out of foreign code. What it has left half-done goes with this process.
            unfit(name, f"import failed: {in_words(error)}")
            raise
        reason = why_unfit(before)
        if reason is not None:
            unfit(name, reason)
        loaded.append(name)
    return loaded, missing


def why_unfit(before: Surroundings) -> str | None:
    """Return why this process must not be forked after an import, or None."""
    now = surroundings()
    opened = {number: target for number, target in now.descriptors.items() if number not in before.descriptors}
    if opened:
        return f"leaves descriptors open: {', '.join(sorted(set(opened.values())))}"
    if now.folder != before.folder:
        return f"changes the current folder to {now.folder}"
    changed = [number for number, handler in before.handlers.items() if now.handlers[number] is not handler]
    if changed:
        return f"changes what these signals do: {', '.join(map(_signal_name, changed))}"
    if now.streams != before.streams or any(getattr(stream, "closed", False) for stream in now.streams):
        return "replaces or closes the standard streams"
    torch_cuda = sys.modules.get("torch.cuda")
    if torch_cuda is not None and torch_cuda.is_initialized():
        return "initialises CUDA"
    if has_children():
        return "starts processes"
    if _threads_settled():
        # OpenBLAS and its like end their threads before a fork and start them again on demand: only a fork can tell.
        _probe_fork()
        if _threads_settled():
            return f"starts threads: {', '.join(sorted(_thread_names()))}"
    return None


def shadowed(folder: str, loaded: Iterable[str]) -> list[str]:
    """Return the modules of `folder` that a rank would miss because another of that name is loaded already.

    Under plain Python the script's folder comes first, so its own `queue.py` wins over the standard library's. In a
    preloaded parent the other one is in `sys.modules` long before.
    """
    try:
        entries = sorted(entry.name for entry in Path(folder).iterdir())
    except OSError:
        return []
    candidates = {entry.partition(".")[0] for entry in entries}
    found = []
    for name in loaded:
        if name not in candidates or "." in name or name in sys.builtin_module_names:
            continue
        spec = getattr(sys.modules.get(name), "__spec__", None)
        # Modules without a spec are `__main__` and its like; built-in and frozen ones win over any folder.
        if spec is None or spec.loader in (BuiltinImporter, FrozenImporter) or not spec.origin:
            continue
        here = importlib.machinery.PathFinder.find_spec(name, [folder])
        if here is None or not here.origin or os.path.realpath(here.origin) == os.path.realpath(spec.origin):
            continue
        found.append(name)
    return found


def in_words(error: BaseException) -> str:
    """Return an exception in one line."""
    lines = describe(error).message.strip().splitlines()
    # It becomes a word of a command line, which has its limits.
    return f"{type(error).__name__}: {lines[0][:_REASON_CHARS]}".replace("\0", "\\0") if lines else type(error).__name__


def _signal_name(number: int) -> str:
    return number.name if isinstance(number, signal.Signals) else str(number)


def _threads_settled() -> list[str]:
    """Return the names that the system has of the threads a fork would miss."""
    end_s = time.monotonic() + _SETTLE_S
    while (names := _task_names()) and time.monotonic() < end_s:
        time.sleep(0.005)
    return names


def _task_names() -> list[str]:
    names = [_task_name(task) for task in _TASKS.iterdir() if int(task.name) != os.getpid()]
    return [name for name in names if name not in _SAFE_TASKS]


def _probe_fork() -> None:
    pid = fork()
    if pid == 0:
        os._exit(0)
    with suppress(ChildProcessError):  # a module may have this process's children reaped
        os.waitpid(pid, 0)


def _thread_names() -> set[str]:
    names = {thread.name for thread in threading.enumerate() if thread is not threading.main_thread()}
    return names or set(_task_names())


def _task_name(task: Path) -> str:
    try:
        return (task / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return "ended"
