"""Ranks without a launcher: nobody reports how they end, and nobody but the agent can end them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping

from ckptd.daemon.living import started


class Orphans:
    """Watches processes that are no children of ours. `on_end` gets rank and pid of each that has ended, once."""

    def __init__(self, on_end: Callable[[int, int], None]) -> None:
        self._on_end = on_end
        self._watched: dict[int, tuple[int, int]] = {}
        """The process and its pidfd, by rank."""

    def __bool__(self) -> bool:
        return bool(self._watched)

    def take(self, ranks: Mapping[int, tuple[int, int]]) -> None:
        """Watch ranks: the process and when it began; who has its number now and began at another time is not meant."""
        loop = asyncio.get_running_loop()
        for rank, (pid, began) in ranks.items():
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                loop.call_soon(self._on_end, rank, pid)
                continue
            if started(pid) != began:  # looked at while the descriptor holds on to whoever it is
                os.close(pidfd)
                loop.call_soon(self._on_end, rank, pid)
                continue
            self._watched[rank] = pid, pidfd
            loop.add_reader(pidfd, self._ended, rank)

    def _ended(self, rank: int) -> None:
        pid = self.forget(rank)
        if pid is not None:
            # What a rank has said of its end may still lie in its socket.
            asyncio.get_running_loop().call_soon(self._on_end, rank, pid)

    def forget(self, rank: int) -> int | None:
        """Watch a rank no more; return its process, if it was watched."""
        pid, pidfd = self._watched.pop(rank, (None, -1))
        if pid is not None:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)
        return pid

    def kill(self, number: int) -> None:
        """Send a signal to the process group of each, which it leads."""
        for pid, pidfd in self._watched.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(pidfd, 0)
                os.killpg(pid, number)

    def end(self, rank: int) -> None:
        """Kill the process of one rank, if it is watched, and nobody else: who leads its group nobody knows."""
        if rank in self._watched:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(self._watched[rank][1], signal.SIGKILL)

    def close(self) -> None:
        """Watch nobody any more."""
        for rank in list(self._watched):
            self.forget(rank)
