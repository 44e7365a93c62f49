"""What a job's command means, and how the agent starts the launcher for it: pure functions, tested with literals.

Two decisions live here. `plan_command` chooses between forking a preloaded Python and a plain exec, and refuses a
command that can't work before anything is started. `LauncherOptions` is the launcher's own command line; composing
and reading it sit side by side, because the launcher also writes it when it has to begin anew.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ckptd.errors import ConfigError

Mode = Literal["script", "module", "exec"]
_ARCHIVES = (".zip", ".pyz")


@dataclass(frozen=True, slots=True)
class RankCommand:
    """How each rank of a job is started.

    "script" and "module" are forked from the preloaded launcher; "exec" is a new program, preloaded or not.
    """

    mode: Mode
    target: str
    """The script's path as given, the module's name, or the program."""
    arguments: tuple[str, ...]


def plan_command(
    command: Sequence[str],
    *,
    preload: bool,
    python: str,
    cwd: str = ".",
    path: str | None = None,
    is_file: Callable[[str], bool] = os.path.isfile,
    find_program: Callable[..., str | None] = shutil.which,
) -> RankCommand:
    """Decide how the ranks of `command` start; raises `ConfigError` for a command that can't be started at all.

    Only what is certainly Python (a `.py` file, `-m NAME`) is forked: guessing by content would turn a wrong guess
    into a rank that behaves in ways nobody asked for. `cwd` is the job's folder and `path` its PATH, since both
    may differ from the caller's. Whether a module exists is left to the rank, whose Python may not be ours.
    """
    if not command:
        raise ConfigError("there is no command to run", hint="put it after --, as in: -- train.py --steps 300")
    first, rest = command[0], tuple(command[1:])
    if first == "-m":
        return _plan_module(rest, preload=preload, python=python)
    if first.startswith("-") or not first:
        raise ConfigError(
            f"the command begins with {first!r}", hint="put a script, -m MODULE or a program first, then its arguments"
        )
    here = os.path.join(cwd, first)
    if first.endswith(".py") and not is_file(os.path.join(here, "__main__.py")):
        if not is_file(here):
            raise ConfigError(
                f"there is no script {first}", hint=f"a relative name is looked up in the job's folder, {cwd}"
            )
        return RankCommand("script", first, rest) if preload else RankCommand("exec", python, (first, *rest))
    if is_file(os.path.join(here, "__main__.py")) or (first.endswith(_ARCHIVES) and is_file(here)):
        return RankCommand("exec", python, (first, *rest))
    if find_program(here if "/" in first else first, path=path) is None:
        raise _no_program(first, exists=is_file(here))
    return RankCommand("exec", first, rest)


def _plan_module(rest: tuple[str, ...], *, preload: bool, python: str) -> RankCommand:
    if not rest or rest[0].startswith("-"):
        raise ConfigError("-m needs the name of a module", hint="as in: -- -m package.train --steps 300")
    if preload:
        return RankCommand("module", rest[0], rest[1:])
    return RankCommand("exec", python, ("-m", *rest))


def _no_program(name: str, *, exists: bool) -> ConfigError:
    if exists:
        return ConfigError(
            f"{name} can't be executed", hint=f"name a Python script so that it ends in .py; else: chmod +x {name}"
        )
    return ConfigError(f"there is no command {name}", hint="it was looked up on the job's PATH")


@dataclass(frozen=True, slots=True)
class Belonging:
    """To which run of which job a launcher belongs, and where and how long it looks for the next agent."""

    job: str
    incarnation: str
    socket: str
    wait_s: float


@dataclass(frozen=True, slots=True)
class LauncherOptions:
    """The launcher's command line as a value."""

    control_fd: int
    """The launcher's end of the stream socket that it shares with the agent."""
    command: tuple[str, ...]
    preload: tuple[str, ...] = ()
    """Modules to import before the first fork, in this order; none means that ranks are started by plain exec."""
    belongs: Belonging | None = None
    """Who goes on with the ranks when the agent is gone; None: they end."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Modules that an earlier start of this launcher found unfit, with the reason."""
    began_s: float | None = None
    """Monotonic time of the first start, so that a start anew does not hide how long it all took."""

    def to_argv(self) -> list[str]:
        """Return what follows `-m ckptd.launcher`."""
        argv = [f"--control-fd={self.control_fd}", f"--preload={','.join(self.preload)}"]
        if self.belongs is not None:
            belongs = self.belongs
            argv += [f"--job={belongs.job}", f"--incarnation={belongs.incarnation}"]
            argv += [f"--socket={belongs.socket}", f"--agent-wait={belongs.wait_s!r}"]
        argv += [f"--skip={name}={reason}" for name, reason in self.skipped.items()]
        if self.began_s is not None:
            argv.append(f"--began-s={self.began_s!r}")
        return [*argv, "--", *self.command]

    @classmethod
    def from_argv(cls, argv: Sequence[str]) -> LauncherOptions:
        """Read what `to_argv` wrote."""
        split = list(argv).index("--") if "--" in argv else len(argv)
        parser = argparse.ArgumentParser(
            prog="python -m ckptd.launcher", description="Started by the agent, never by hand: it forks a job's ranks."
        )
        parser.add_argument("--control-fd", type=int, required=True)
        parser.add_argument("--preload", default="")
        parser.add_argument("--job")
        parser.add_argument("--incarnation", default="")
        parser.add_argument("--socket", default="")
        parser.add_argument("--agent-wait", type=float, default=0.0)
        parser.add_argument("--skip", action="append", default=[])
        parser.add_argument("--began-s", type=float)
        given = parser.parse_args(list(argv)[:split])
        belongs = None
        if given.job is not None:
            belongs = Belonging(given.job, given.incarnation, given.socket, given.agent_wait)
        return cls(
            control_fd=given.control_fd,
            command=tuple(argv[split + 1 :]),
            preload=tuple(name.strip() for name in given.preload.split(",") if name.strip()),
            belongs=belongs,
            skipped={name: reason for name, _, reason in (item.partition("=") for item in given.skip)},
            began_s=given.began_s,
        )


def launcher_argv(
    *,
    python: str,
    control_fd: int,
    command: Sequence[str],
    preload: Sequence[str],
    belongs: Belonging | None = None,
) -> list[str]:
    """Return the command that starts the launcher of a job; without `belongs` it ends with its agent.

    An empty `preload` is `--no-preload`: the ranks are then started by plain exec. The descriptor must be passed on
    (`pass_fds`), and the job's whole environment must be set already, because libraries read theirs at import.
    """
    options = LauncherOptions(control_fd=control_fd, command=tuple(command), preload=tuple(preload), belongs=belongs)
    return [python, "-m", "ckptd.launcher", *options.to_argv()]
