"""The files of a bundle while they are gathered: in memory, within a budget, and each with what it shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

READ_BYTES = 256 * 1024
"""How much of a small file is read at most."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One file of a bundle."""

    name: str
    data: bytes
    about: str
    """What it shows, in words."""
    keep_end: bool = False
    """Whether its end is what matters, should it be too long."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one step of the gathering has found, and what it could not find and why."""

    pieces: tuple[Piece, ...] = ()
    missing: tuple[str, ...] = ()


def text_piece(name: str, text: str, about: str) -> Piece:
    """Return a piece of text."""
    return Piece(name, text.encode(errors="replace"), about)


def fit(pieces: Iterable[Piece], max_bytes: int) -> tuple[list[Piece], list[str]]:
    """Return what fits into `max_bytes`, the first ones first, and what had to be cut.

    Of text the part that matters is kept. What is no text is left out as a whole.
    """
    kept: list[Piece] = []
    cut: list[str] = []
    left_bytes = max_bytes
    for piece in pieces:
        size_bytes = len(piece.data)
        if size_bytes > left_bytes:
            cut.append(f"{piece.name}: cut from {size_bytes} bytes to {left_bytes}, more is not kept of an incident")
        data = piece.data if size_bytes <= left_bytes else _cut(piece, left_bytes)
        if data:
            kept.append(replace(piece, data=data))
        left_bytes -= len(data)
    return kept, cut


def _cut(piece: Piece, size_bytes: int) -> bytes:
    if b"\0" in piece.data[:1024] or size_bytes <= 0:
        return b""
    if not piece.keep_end:
        return piece.data[:size_bytes]
    end = piece.data[-size_bytes:]
    return end[end.find(b"\n") + 1 :]


def read_head(path: Path, max_bytes: int = READ_BYTES) -> str | None:
    """Return the beginning of a file; None when it can't be read."""
    try:
        with path.open("rb") as file:
            return file.read(max_bytes).decode(errors="replace")
    except OSError:
        return None


def read_tail(path: Path, max_bytes: int) -> bytes | None:
    """Return the end of a file, from the beginning of a line; None when it can't be read."""
    try:
        with path.open("rb") as file:
            begin = max(0, file.seek(0, 2) - max_bytes)
            file.seek(begin)
            data = file.read(max_bytes)
    except OSError:
        return None
    return data if not begin else data[data.find(b"\n") + 1 :]
