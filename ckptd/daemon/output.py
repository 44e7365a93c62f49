"""What ranks print: kept in files that outlive agent and ranks, and shown in the foreground with a rank prefix.

Ranks write straight to files, not to pipes of the agent: a killed agent must not break their prints, nor lose them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TextIO

from ckptd.log import Sink

_TAIL_BYTES = 16 * 1024
_READ_BYTES = 256 * 1024
_PUMP_BYTES = 2**20
"""How much of one file is passed on at once: a rank that prints without end must not hold the agent's loop."""
_LINE_BYTES = 64 * 1024
"""A longer line is passed on in pieces; a progress bar may never end its own."""
_COLORS = (36, 33, 35, 32, 34, 31)


def output_paths(folder: Path, rank: int) -> tuple[Path, Path]:
    """Return the files of a rank's stdout and stderr in a generation's log folder."""
    return folder / f"rank-{rank:05d}.out", folder / f"rank-{rank:05d}.err"


def last_lines(path: Path, count: int = 20) -> tuple[str, ...]:
    """Return the last lines of a file, few enough to be kept with an incident."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read(_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ()
    return tuple(text.splitlines()[-count:])


class OutputFollower:
    """Follows the files of one generation's ranks and passes whole lines on, each after its rank."""

    def __init__(self, target: TextIO, errors: TextIO, *, colors: bool) -> None:
        self._targets = {".out": Sink(target), ".err": Sink(errors)}
        self._encodings = {".out": target.encoding or "utf-8", ".err": errors.encoding or "utf-8"}
        self._colors = colors
        self._files: dict[Path, tuple[int, str, bytearray]] = {}

    def follow(self, path: Path, rank: int) -> None:
        """Begin to follow a file of a rank, from its present end."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.lseek(descriptor, 0, os.SEEK_END)
        self._files[path] = (descriptor, self._prefix(rank), bytearray())

    def _prefix(self, rank: int) -> str:
        if not self._colors:
            return f"[{rank}] "
        return f"\x1b[{_COLORS[rank % len(_COLORS)]}m[{rank}]\x1b[0m "

    def pump(self, *, final: bool = False) -> None:
        """Pass on what has been written since the last call; `final` also passes on a last line without its end."""
        for path, (descriptor, prefix, rest) in self._files.items():
            left = sys.maxsize if final else _PUMP_BYTES
            while left > 0 and (data := os.read(descriptor, _READ_BYTES)):
                left -= len(data)
                *lines, tail = (bytes(rest) + data).split(b"\n")
                rest[:] = tail
                for line in lines:
                    self._show(path.suffix, prefix, line)
                if len(rest) > _LINE_BYTES:
                    self._show(path.suffix, prefix, bytes(rest))
                    rest.clear()
            if final and rest:
                self._show(path.suffix, prefix, bytes(rest))
                rest.clear()
            self._targets[path.suffix].flush()

    def _show(self, stream: str, prefix: str, line: bytes) -> None:
        encoding = self._encodings[stream]
        text = line.decode(errors="replace").encode(encoding, errors="replace").decode(encoding)
        self._targets[stream].write(f"{prefix}{text}\n")

    def close(self) -> None:
        """Pass on the rest and let go of the files."""
        self.pump(final=True)
        for descriptor, _, _ in self._files.values():
            os.close(descriptor)
        self._files.clear()
