"""Where the agent's socket is, and how to reach it: shared by client, launcher and command line.

A unix socket's name is limited to 107 bytes while state folders may lie deeper, so a name that is too long is
reached through `/proc/self/fd/N/NAME` of its opened folder. Paths are plain strings: `pathlib` would double what
importing the client costs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_MAX_NAME_BYTES = 100


def home(environ: Mapping[str, str]) -> str:
    """Return the state folder: `$CKPTD_HOME`, else `~/.local/state/ckptd`."""
    named = environ.get("CKPTD_HOME")
    if named:
        return os.path.abspath(named)
    return os.path.join(environ.get("HOME") or "/root", ".local", "state", "ckptd")


def socket_path(environ: Mapping[str, str]) -> str:
    """Return the socket's place: `$CKPTD_SOCKET`, else under `$XDG_RUNTIME_DIR`, else under the state folder."""
    named = environ.get("CKPTD_SOCKET")
    if named:
        return os.path.abspath(named)
    runtime = environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return os.path.join(runtime, "ckptd", "ckptd.sock")
    return os.path.join(home(environ), "ckptd.sock")


@contextmanager
def short_name(path: str) -> Iterator[str]:
    """Yield a name for `path` that fits into a socket address, valid inside the block."""
    if len(os.fsencode(path)) <= _MAX_NAME_BYTES:
        yield path
        return
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


def connect(path: str, timeout_s: float) -> socket.socket:
    """Return a stream connected to the agent at `path`; raises `OSError` when nobody listens there."""
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    stream.settimeout(timeout_s)
    try:
        with short_name(path) as name:
            stream.connect(name)
    except BaseException:
        stream.close()
        raise
    return stream
