"""Counts the file-system calls that an agent makes below some folders, notes them, and does harm at the n-th.

Loaded into the agent's process alone. It stands where the storage layer meets the operating system: the functions of
`os`, `io.open`, `fcntl`, and the two of libc that are called by ctypes. That none is missed is proven with strace, by
`test_counting.py`. Every call is one line of JSON in a file, written before it is made and after it has returned, so
that what a killed agent has done is known to the last call.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import functools
import io
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

BY_PATH = (
    "chmod", "link", "listdir", "lstat", "mkdir", "open", "remove", "rename", "replace", "rmdir", "scandir", "stat",
    "statvfs", "symlink", "truncate", "unlink", "utime",
)  # fmt: skip
BY_DESCRIPTOR = (
    "fchmod", "fdatasync", "fstat", "fsync", "ftruncate", "posix_fallocate", "pread", "preadv", "pwrite", "pwritev",
    "read", "write",
)  # fmt: skip
MUTATING = (
    "chmod", "create", "fallocate", "fchmod", "fdatasync", "fsync", "ftruncate", "link", "mkdir", "posix_fallocate",
    "pwrite", "pwritev", "remove", "rename", "replace", "rmdir", "symlink", "truncate", "unlink", "utime", "write",
)  # fmt: skip
"""Those after which a disk is another one than before; "create" is an open for writing."""
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_TWO_PATHS = ("link", "rename", "replace", "symlink")
_WRITES = ("pwrite", "write")
_BLOCK_BYTES = 4096


@dataclass(frozen=True)
class Harm:
    """What happens at the call number `at`, counted from 1; nothing when that is 0."""

    at: int = 0
    what: str = "kill before"
    """"kill before", "kill after", "short" (a write that takes only a part), or the name of an errno to fail with."""
    times: int = 1
    """At how many calls, one after another: a disk that is broken for a while."""
    only: tuple[str, ...] = ()
    """Which calls are counted, all when empty."""

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.what if self.times == 1 else f"{self.what} for long"

    def hits(self, number: int) -> bool:
        """Whether a call is met."""
        return 0 < self.at <= number < self.at + self.times


class Calls:
    """The calls of one process. `install` puts it in their way, for good."""

    def __init__(self, roots: Sequence[str], log: str, harm: Harm) -> None:
        self._roots = tuple(os.path.realpath(root) for root in roots)
        self._harm = harm
        self._lock = threading.Lock()
        self._count = 0
        self._write, self._readlink = os.write, os.readlink
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._pid = os.getpid()

    def install(self) -> None:
        """Wrap everything."""
        for name in BY_PATH:
            setattr(os, name, self._wrapped(name, getattr(os, name), self._of_paths(2 if name in _TWO_PATHS else 1)))
        for name in BY_DESCRIPTOR:
            setattr(os, name, self._wrapped(name, getattr(os, name), self._of_descriptor))
        for name in ("fcntl", "flock"):
            setattr(fcntl, name, self._wrapped(name, getattr(fcntl, name), self._of_descriptor))
        opened = io.open
        io.open = builtins.open = self._opener(opened)  # type: ignore[assignment]
        from ckptd.storage import direct, spares

        direct._libc.fallocate = self._wrapped("fallocate", direct._libc.fallocate, self._of_descriptor, as_libc=True)
        spares._libc.statfs = self._wrapped("statfs", spares._libc.statfs, self._of_paths(1), as_libc=True)

    def _below(self, path: Any) -> str | None:
        if isinstance(path, int):
            return self._of_number(path)
        try:
            absolute = os.path.abspath(os.fsdecode(path))
        except TypeError:
            return None
        return absolute if absolute.startswith(self._roots) else None

    def _of_number(self, descriptor: int) -> str | None:
        try:
            path = self._readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            return None
        return path if path.startswith(self._roots) else None

    def _of_paths(self, count: int) -> Callable[[Any], list[str | None]]:
        return lambda arguments: [self._below(path) for path in arguments[:count]] if arguments else [None]

    def _of_descriptor(self, arguments: Any) -> list[str | None]:
        first = arguments[0]
        return [self._of_number(first if isinstance(first, int) else first.fileno())]

    def _note(self, number: int, name: str, paths: list[str | None], **more: Any) -> None:
        line = {"n": number, "call": name, "paths": paths, **more}
        self._write(self._log, json.dumps(line).encode() + b"\n")

    def _wrapped(
        self, name: str, real: Callable[..., Any], find: Callable[[Any], list[str | None]], *, as_libc: bool = False
    ) -> Callable[..., Any]:
        @functools.wraps(real) if not as_libc else lambda function: function
        def call(*arguments: Any, **options: Any) -> Any:
            paths = find(arguments)
            if os.getpid() != self._pid or not any(paths):
                return real(*arguments, **options)
            return self._counted(name, paths, functools.partial(real, **options), arguments, as_libc)

        return call

    def _counted(
        self, name: str, paths: list[str | None], real: Callable[..., Any], arguments: Any, as_libc: bool
    ) -> Any:
        harm = self._harm
        if name == "open" and len(arguments) > 1 and arguments[1] & _FOR_WRITING:
            name = "create"
        number = 0
        if not harm.only or name in harm.only:
            with self._lock:
                self._count += 1
                number = self._count
        size = len(arguments[1]) if name in _WRITES else None
        self._note(number, name, paths, begin=True, thread=threading.get_native_id(), size=size)
        if harm.hits(number) and harm.what != "kill after":
            if harm.what == "kill before":
                self._die()
            if harm.what == "short":
                arguments = _shortened(name, arguments)
            else:
                self._note(number, name, paths, failed=harm.what)
                return _fail(getattr(errno, harm.what), as_libc)
        try:
            result = real(*arguments)
        except OSError as error:
            self._note(number, name, paths, failed=errno.errorcode.get(error.errno or 0))
            if harm.hits(number) and harm.what == "kill after":
                self._die()
            raise
        self._note(number, name, paths, done=True)
        if harm.hits(number) and harm.what == "kill after":
            self._die()
        return result

    def _die(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        threading.Event().wait()

    def _opener(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Files opened by name through `io`: their opening counts, and so does the closing of one that was written."""

        @functools.wraps(real)
        def call(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            path = None if isinstance(file, int) else self._below(file)
            if path is None or os.getpid() != self._pid:
                return real(file, mode, *arguments, **options)
            writes = bool(mode.strip("btr"))
            name = "create" if writes else "open"
            opened = self._counted(name, [path], lambda: real(file, mode, *arguments, **options), (), False)
            if not writes:
                return opened
            return _Written(opened, lambda close: self._counted("write", [path], lambda *_: close(), (0, b""), False))

        return call


class _Written:
    """A file that is written through `io`: what was written reaches the kernel when it is closed."""

    def __init__(self, file: Any, close: Callable[[Callable[[], None]], None]) -> None:
        self._file = file
        self._close = close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def close(self) -> None:
        """Write what is buffered, and close."""
        if not self._file.closed:
            self._close(self._file.close)


def _shortened(name: str, arguments: Any) -> Any:
    """Let a write take half of its bytes, in whole blocks if there are several: as a disk does that is almost full."""
    if name not in _WRITES or len(arguments[1]) < 2:
        return arguments
    half = len(arguments[1]) // 2
    whole = half - half % _BLOCK_BYTES
    return (arguments[0], memoryview(arguments[1])[: whole or half], *arguments[2:])


def _fail(number: int, as_libc: bool) -> int:
    if as_libc:
        ctypes.set_errno(number)
        return -1
    raise OSError(number, os.strerror(number))


def to_json(roots: Sequence[str], log: str, harm: Harm) -> str:
    """Return what `install` takes, for a command line."""
    return json.dumps({"roots": list(roots), "log": log, "harm": asdict(harm)})


def install(text: str) -> None:
    """Begin to count in this process."""
    given = json.loads(text)
    harm = given["harm"]
    Calls(given["roots"], given["log"], Harm(**{**harm, "only": tuple(harm["only"])})).install()
