"""Python stacks of another process, read by py-spy from its memory while it goes on, or stands still.

py-spy is asked not to stop the process: one that is stopped already would keep it waiting, and a py-spy that is killed
half-way would leave a process stopped for good. A stack that moves while it is read can come out wrong, or not at
all; then it is read again. No signal is sent to have a rank print its stack by itself: without a handler it would die.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.core.policy.activities import Frame

_TRIES = 4
_PAUSE_S = 0.05
_MAX_SOURCE_BYTES = 2 * 2**20
_MAX_TEXT = 100
_REFUSED = (
    "this process may not read the memory of others; run the agent as root or with CAP_SYS_PTRACE, in a container with "
    "--cap-add SYS_PTRACE, or set kernel.yama.ptrace_scope to 0"
)


@dataclass(frozen=True, slots=True)
class PythonThread:
    """One Python thread and its calls, innermost first."""

    tid: int
    name: str
    holds_gil: bool
    active: bool
    frames: tuple[Frame, ...]


@dataclass(frozen=True, slots=True)
class Stacks:
    """All Python threads of a process, or the reason why they are not known."""

    threads: tuple[PythonThread, ...] = ()
    problem: str = ""


def find_py_spy() -> str | None:
    """Return the program that reads stacks: the one installed beside ckptd, or else the first in the PATH."""
    folders = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    return shutil.which("py-spy", path=os.pathsep.join(folders)) or shutil.which("py-spy")


def read_stacks(pid: int, until_s: float, program: str | None) -> Stacks:
    """Return the Python stacks of a process, by monotonic `until_s`, with `program` as `find_py_spy` found it."""
    if program is None:
        return Stacks(problem="py-spy is not installed; pip install py-spy beside ckptd")
    command = [program, "dump", "--nonblocking", "--json", "--full-filenames", "--pid", str(pid)]
    problem = "there was no time left for py-spy"
    for _ in range(_TRIES):
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            break
        try:
            done = subprocess.run(
                command, capture_output=True, timeout=left_s, check=False, stdin=subprocess.DEVNULL, env=_environ()
            )
        except subprocess.TimeoutExpired:
            return Stacks(problem="py-spy did not come back in time")
        except OSError as error:
            return Stacks(problem=f"py-spy can't be started: {error.strerror}")
        if done.returncode == 0:
            return _parse(done.stdout)
        problem = _reason(done.stderr.decode(errors="replace"))
        if problem == _REFUSED:
            break
        time.sleep(_PAUSE_S)
    return Stacks(problem=problem)


def _environ() -> dict[str, str]:
    return {**os.environ, "RUST_BACKTRACE": "0", "NO_COLOR": "1"}


def _reason(said: str) -> str:
    if "ermission denied" in said or "os error 1)" in said or "perm" in said.lower():
        return _REFUSED
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f"py-spy failed: {' / '.join(lines[:3]) or 'it said nothing'}"


def _parse(output: bytes) -> Stacks:
    try:
        found = json.loads(output)
        threads = tuple(_thread(item) for item in found)
    except (ValueError, KeyError, TypeError) as error:
        return Stacks(problem=f"py-spy's answer is not understood: {error!r}")
    return Stacks(threads) if threads else Stacks(problem="py-spy saw no Python thread")


def _thread(item: dict[str, Any]) -> PythonThread:
    frames = tuple(
        Frame(str(frame["name"]), str(frame["filename"]), int(frame["line"] or 0)) for frame in item["frames"]
    )
    tid = int(item.get("os_thread_id") or 0)
    return PythonThread(tid, str(item.get("thread_name") or ""), bool(item["owns_gil"]), bool(item["active"]), frames)


def main_thread(stacks: Stacks, pid: int) -> PythonThread | None:
    """Return the main thread; None when there is none."""
    threads = stacks.threads
    by_number = next((item for item in threads if item.tid == pid), None)
    return by_number or next((item for item in threads if item.name == "MainThread"), None)


def with_source(frames: tuple[Frame, ...], read: Callable[[str], list[str]]) -> tuple[Frame, ...]:
    """Return calls with the text of their lines, as far as `read` knows the files."""
    shown = []
    for frame in frames:
        lines = read(frame.file)
        text = lines[frame.line - 1].strip() if 0 < frame.line <= len(lines) else ""
        shown.append(frame._replace(text=text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."))
    return tuple(shown)


def source_reader() -> Callable[[str], list[str]]:
    """Return a function that gives the lines of a source file, none for what is no such file; it remembers them."""
    known: dict[str, list[str]] = {}

    def read(name: str) -> list[str]:
        if name not in known:
            known[name] = _source(Path(name))
        return known[name]

    return read


def _source(path: Path) -> list[str]:
    try:
        if not path.is_absolute() or not path.is_file() or path.stat().st_size > _MAX_SOURCE_BYTES:
            return []
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def show(rank: int, pid: int, stacks: Stacks, read: Callable[[str], list[str]]) -> str:
    """Return the stacks of a rank as people read them: innermost call last, as in a traceback."""
    lines = [f"rank {rank}, process {pid}"]
    if stacks.problem:
        lines.append(f"  no stack: {stacks.problem}")
    for item in stacks.threads:
        marks = ", ".join(word for word, holds in (("runs", item.active), ("holds the GIL", item.holds_gil)) if holds)
        lines.append(f"  thread {item.tid} {item.name}{f' ({marks})' if marks else ''}")
        for frame in reversed(with_source(item.frames, read)):
            lines.append(f'    File "{frame.file}", line {frame.line}, in {frame.function}')
            if frame.text:
                lines.append(f"      {frame.text}")
    return "\n".join(lines) + "\n"
