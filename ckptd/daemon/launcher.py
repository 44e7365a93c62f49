"""The agent's side of a job's launcher: starts it or takes it over, talks to it, and learns of its end from a pidfd."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ckptd.daemon.connection import Connection
from ckptd.launcher.command import Belonging, launcher_argv
from ckptd.protocol.messages import Dissolve, Message
from ckptd.units import show_signal

OnExit = Callable[[int | None], None]
"""Gets the return code, once; None when the launcher is no child of ours, so that nobody tells us."""


class LauncherProcess:
    """A running launcher. What it is told while it is not connected is lost."""

    def __init__(self, pid: int, pidfd: int, process: subprocess.Popen[bytes] | None, on_exit: OnExit) -> None:
        """Watch the process behind `pidfd`, which is taken over; `process` is what started it, if that was us."""
        self.pid = pid
        self.ended: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._pidfd: int | None = pidfd
        self._process = process
        self._on_exit = on_exit
        self._connection: Connection | None = None
        asyncio.get_running_loop().add_reader(pidfd, self._exited)

    @property
    def connected(self) -> bool:
        """Whether it can be told anything, as far as we know."""
        return self._connection is not None

    def connect(self, connection: Connection) -> None:
        """Talk to it over this connection from now on."""
        before, self._connection = self._connection, connection
        if before is not None:
            before.close()

    def disconnected(self, connection: Connection) -> None:
        """Take note of a connection that is closed; one that lives comes back over another."""
        if self._connection is connection:
            self._connection = None

    def send(self, message: Message) -> None:
        """Ask it to do something."""
        if self._connection is not None:
            self._connection.send(message)

    def signal(self, number: int) -> None:
        """Send it a signal, whether it is connected or not."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _exited(self) -> None:
        assert self._pidfd is not None
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = None  # at once: the next descriptor of this agent gets its number, and may be of a process, too
        returncode = None if self._process is None else self._process.wait()
        # What it said last may still lie in the socket; the loop reads that before this callback.
        asyncio.get_running_loop().call_soon(self._report, returncode)

    def _report(self, returncode: int | None) -> None:
        if self._connection is not None:
            self._connection.close()
        self.ended.set_result(returncode)
        self._on_exit(returncode)

    async def close(self, grace_s: float = 5.0) -> None:
        """End it with every rank: by a word, or a signal when it can't be told; by SIGKILL if that takes too long."""
        self.send(Dissolve())
        if self._connection is not None:
            self._connection.close()
        else:  # it was not connected, or has hung up
            self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(asyncio.shield(self.ended), grace_s)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self.ended


def how_it_ended(returncode: int | None) -> str:
    """Say how a launcher ended; None where nobody can tell."""
    if returncode is None:
        return "the launcher is gone"
    return f"the launcher ended with {show_signal(-returncode) if returncode < 0 else f'exit code {returncode}'}"


def start_launcher(
    *,
    python: str,
    command: Sequence[str],
    preload: Sequence[str],
    belongs: Belonging | None,
    cwd: str,
    env: Mapping[str, str],
    log: Path,
    on_message: Callable[[Message], None],
    on_exit: OnExit,
) -> LauncherProcess:
    """Start a launcher; without `belongs` it ends with this process.

    `on_message` gets what it says. Raises `OSError` when the interpreter or the folder isn't there.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    argv = launcher_argv(python=python, control_fd=theirs.fileno(), command=command, preload=preload, belongs=belongs)
    try:
        with theirs, log.open("ab") as output:
            process = subprocess.Popen(
                argv,
                cwd=cwd,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                # Ctrl-C in the terminal is the agent's to handle. No session of its own: where the kernel groups
                # tasks by session (autogroup), niceness counts within one, and flushes should yield to ranks.
                process_group=0,
            )
    except OSError:
        ours.close()
        raise
    if os.environ.get("NOTIFY_SOCKET"):
        spare_no_more(process.pid)
    launcher = LauncherProcess(process.pid, os.pidfd_open(process.pid), process, on_exit)
    launcher.connect(Connection(ours, lambda _, message: on_message(message), launcher.disconnected))
    return launcher


def spare_no_more(pid: int, proc: Path = Path("/proc")) -> None:
    """Have a process, and its children to come, die for want of memory like any other one.

    A service may ask the kernel to spare its agent (`OOMScoreAdjust=`), which all that it starts inherits. But ranks
    are what takes the memory of a node, and to spare them is to end everybody else first.
    """
    with contextlib.suppress(OSError):
        if int((proc / "self/oom_score_adj").read_text()) < 0:
            (proc / f"{pid}/oom_score_adj").write_text("0")
