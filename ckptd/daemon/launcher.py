"""The agent's side of a job's launcher: starts it, talks to it, and learns from a pidfd when it dies."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from ckptd.daemon.connection import Connection
from ckptd.launcher.command import launcher_argv
from ckptd.protocol.messages import Message


class LauncherProcess:
    """A running launcher. `on_message` gets what it says, `on_exit` its return code, once."""

    def __init__(
        self,
        *,
        python: str,
        command: Sequence[str],
        preload: Sequence[str],
        on_agent_loss: Literal["end", "keep"],
        cwd: str,
        env: Mapping[str, str],
        log: Path,
        on_message: Callable[[Message], None],
        on_exit: Callable[[int], None],
    ) -> None:
        """Start it; raises `OSError` when the interpreter or the folder isn't there."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        argv = launcher_argv(
            python=python,
            control_fd=theirs.fileno(),
            command=command,
            preload=preload,
            on_agent_loss=on_agent_loss,
        )
        try:
            with theirs, log.open("ab") as output:
                self._process = subprocess.Popen(
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
        self.pid = self._process.pid
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._on_exit = on_exit
        self._pidfd = os.pidfd_open(self.pid)
        self._connection = Connection(ours, lambda _, message: on_message(message), lambda _: None)
        asyncio.get_running_loop().add_reader(self._pidfd, self._exited)

    def send(self, message: Message) -> None:
        """Ask it to do something."""
        self._connection.send(message)

    def _exited(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        returncode = self._process.wait()
        # What it said last may still lie in the socket; the loop reads that before this callback.
        asyncio.get_running_loop().call_soon(self._report, returncode)

    def _report(self, returncode: int) -> None:
        self._connection.close()
        self.ended.set_result(returncode)
        self._on_exit(returncode)

    async def close(self, grace_s: float = 5.0) -> None:
        """End it: by closing its socket, which makes it end every rank; by SIGKILL if that takes too long."""
        self._connection.close()
        try:
            await asyncio.wait_for(asyncio.shield(self.ended), grace_s)
        except TimeoutError:
            self._process.kill()
            await self.ended
