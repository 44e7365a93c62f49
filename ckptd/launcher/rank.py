"""From a forked child of the launcher to what `python script.py` would have started.

`RankStart` is handed up from the event loop to the top of the launcher's `__main__`, and only there turns the child
into a rank: the launcher's frames are gone by then, no `finally` of theirs can run in a rank, and whatever the
user's code raises travels straight to the interpreter, which ends the process as it ends any other.
"""

from __future__ import annotations

import errno
import importlib
import os
import runpy
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ckptd.errors import CkptdError
from ckptd.launcher.command import RankCommand
from ckptd.launcher.processes import close_descriptors, die_with
from ckptd.launcher.report import show_below, show_refusal, tell
from ckptd.launcher.stdio import rebuild_streams
from ckptd.protocol import inherited
from ckptd.protocol.failure import is_failure

Dispositions = dict[signal.Signals | int, Any]


def signal_dispositions() -> Dispositions:
    """Return how each signal is handled now; taken before the launcher changes any, it is what a rank gets back."""
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


@dataclass(frozen=True, slots=True)
class RankStart:
    """Everything that a forked child needs to become a rank."""

    command: RankCommand
    env: Mapping[str, str]
    stdout_fd: int
    stderr_fd: int
    launcher_pid: int
    dispositions: Dispositions
    packages: frozenset[str]
    """Of what the launcher would preload more, if the rank says what it has imported of it."""
    interpreter: tuple[str, ...]
    """The interpreter and its own flags, as in `sys.orig_argv`."""

    def become_process(self, *, but: int = -1) -> None:
        """Take on what the kernel knows of a process: group, descriptors (except `but`), signals.

        The child arrives with all signals blocked, so that none meets a handler of the launcher's; what came in
        meanwhile takes effect at the last line here.
        """
        die_with(self.launcher_pid)
        os.setpgid(0, 0)
        null_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(null_fd, 0)
        os.dup2(self.stdout_fd, 1)
        os.dup2(self.stderr_fd, 2)
        close_descriptors(but=but)
        signal.set_wakeup_fd(-1)
        for number, handler in self.dispositions.items():
            # None stands for a handler that C code has set; Python can neither tell nor set it.
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def execute(self, failed_fd: int) -> NoReturn:
        """Replace the child by the command; on failure write the error's number to `failed_fd` and end."""
        try:
            self.become_process(but=failed_fd)
            # Python ignores these two from its start, and what is ignored stays so across exec.
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            environ = {**os.environ, **self.env}
            os.execvpe(self.command.target, [self.command.target, *self.command.arguments], environ)  # noqa: S606
        except (OSError, ValueError) as error:
            # ValueError is what a null byte in a word or a variable gives.
            os.write(failed_fd, str(getattr(error, "errno", errno.EINVAL)).encode())
        finally:
            os._exit(127)

    def run(self) -> None:
        """Run the user's code as `__main__`; returns, or raises, what that code does."""
        self.become_process()
        os.environ.update(self.env)
        rebuild_streams(os.environ)
        inherited.modules, inherited.packages = frozenset(sys.modules), self.packages
        _renew_randomness()
        importlib.invalidate_caches()
        # CPython forgets this at a fork, and profilers know the main thread by it.
        threading.main_thread()._set_native_id()  # type: ignore[attr-defined] # noqa: SLF001
        if self.command.mode == "module":
            words = ("-m", self.command.target, *self.command.arguments)
            sys.argv = ["-m", *self.command.arguments]
            file = None
        else:
            words = (self.command.target, *self.command.arguments)
            sys.argv = list(words)
            file = script_file(self.command.target)
        sys.orig_argv = [*self.interpreter, *words]
        if not sys.flags.safe_path:
            sys.path.insert(0, script_folder(self.command))
        _run_as_main(file, self.command.target)


def script_file(script: str) -> str:
    """Return a script's `__file__` as Python 3.9 and later make it: absolute, and otherwise as given."""
    return os.path.join(Path.cwd(), script)


def script_folder(command: RankCommand) -> str:
    """Return what Python puts first into `sys.path`: the real folder of a script, or the current one for -m."""
    return os.path.dirname(os.path.realpath(command.target)) if command.mode == "script" else str(Path.cwd())


def _run_as_main(file: str | None, target: str) -> None:
    """Execute the script `file`, or the module `target`, in a new `__main__`.

    The name of this function's code is the border: the traceback that a user sees begins below it.
    """
    try:
        namespace = _new_main(file)
        if file is None:
            runpy._run_module_as_main(target)  # type: ignore[attr-defined] # noqa: SLF001 - what `python -m` calls
        else:
            exec(compile(_source(file), file, "exec", dont_inherit=True), namespace)  # noqa: S102 - the user's script
    except CkptdError as error:
        if os.environ.get("CKPTD_DEBUG"):
            show_below(_run_as_main.__code__)
            raise
        show_refusal(error)
        tell(error)
        raise SystemExit(error.exit_code) from None
    except SystemExit as error:
        if is_failure(error):
            tell(error)
        raise
    except BaseException:
        show_below(_run_as_main.__code__)
        raise


def _new_main(file: str | None) -> dict[str, Any]:
    """Put a new `__main__` in place, as the interpreter makes it, and return its namespace."""
    module = ModuleType("__main__")
    namespace = module.__dict__
    namespace["__annotations__"] = {}
    namespace["__builtins__"] = sys.modules["builtins"]
    if file is not None:
        namespace.update(__file__=file, __cached__=None, __loader__=SourceFileLoader("__main__", file))
    sys.modules["__main__"] = module
    if "__mp_main__" in sys.modules:
        # multiprocessing keeps this second name, under which its children find `__main__`.
        sys.modules["__mp_main__"] = module
    return namespace


def _source(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        sys.stderr.write(f"{sys.executable}: can't open file {file!r}: [Errno {error.errno}] {error.strerror}\n")
        raise SystemExit(2) from None


def _renew_randomness() -> None:
    """Draw anew what each process draws for itself at import; Python's own `random` sees to that by itself.

    Ranks that draw the same numbers shuffle alike and drop out alike: training goes on, and learns less.
    """
    modules = sys.modules
    if "numpy.random" in modules:
        modules["numpy.random"].seed()
    # torch seeds its CPU generator from the system when it is imported; those of CUDA begin with a fixed seed.
    generator = getattr(modules.get("torch"), "default_generator", None)
    if generator is not None:
        generator.seed()
    if "multiprocessing.process" in modules:
        modules["multiprocessing.process"].current_process().authkey = os.urandom(32)
