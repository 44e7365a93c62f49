"""The standard streams of a rank, built as CPython's `create_stdio` builds them for a file.

The streams that the launcher was born with were made for its own descriptors and its own environment; a rank has
files instead, and may have been asked to write unbuffered or in another encoding.
"""

from __future__ import annotations

import codecs
import io
import locale
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import TextIO


def flush_streams() -> None:
    """Write out what Python still holds for stdout and stderr, or every forked child would write it again."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError, AttributeError):  # it is full, closed, or a module's own
                stream.flush()


def complain(what: str) -> None:
    """Write a line of the launcher's own to stderr, if that takes any."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            sys.stderr.write(f"ckptd: launcher: {what}\n")
            sys.stderr.flush()


def rebuild_streams(environ: Mapping[str, str]) -> None:
    """Replace stdin, stdout and stderr by streams on descriptors 0, 1 and 2 as a fresh interpreter has them."""
    unbuffered = bool(environ.get("PYTHONUNBUFFERED"))
    encoding, errors = _stdio_codec(environ)
    old_streams = (sys.stdout, sys.stderr)
    sys.stdin = _open("<stdin>", encoding, errors, unbuffered=unbuffered)
    sys.stdout = _open("<stdout>", encoding, errors, unbuffered=unbuffered)
    sys.stderr = _open("<stderr>", encoding, "backslashreplace", unbuffered=unbuffered)
    vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)
    _redirect_log_handlers(dict(zip(old_streams, (sys.stdout, sys.stderr), strict=True)))


def _open(name: str, encoding: str, errors: str, *, unbuffered: bool) -> TextIO:
    number = ("<stdin>", "<stdout>", "<stderr>").index(name)
    writing = number > 0
    # CPython keeps stdin buffered always: a TextIOWrapper reads through read1(), which only buffers have.
    buffering = 0 if unbuffered and writing else -1
    buffer = open(number, "wb" if writing else "rb", buffering=buffering, closefd=False)  # noqa: SIM115 - it stays open
    vars(getattr(buffer, "raw", buffer))["name"] = name
    stream = io.TextIOWrapper(
        buffer,
        encoding=encoding,
        errors=errors,
        newline="\n",
        line_buffering=not unbuffered and (number == 2 or os.isatty(number)),
        write_through=unbuffered,
    )
    stream.mode = "w" if writing else "r"  # type: ignore[misc]
    return stream


def _stdio_codec(environ: Mapping[str, str]) -> tuple[str, str]:
    """Return encoding and error handler as CPython would: PYTHONIOENCODING, else what it chose for this process."""
    born = sys.__stdout__ or sys.__stdin__
    encoding = born.encoding if born else locale.getencoding()
    errors = (born.errors if born else None) or "strict"
    wanted_encoding, _, wanted_errors = environ.get("PYTHONIOENCODING", "").partition(":")
    if wanted_encoding:
        encoding = codecs.lookup(wanted_encoding).name
    if wanted_encoding or wanted_errors:
        errors = wanted_errors or "strict"
    return encoding, errors


def _redirect_log_handlers(streams: dict[TextIO, TextIO]) -> None:
    """Point the log handlers that preloaded modules have made at the new streams.

    They hold the stream that they were given at import, and code like tqdm's knows console handlers by comparing
    that stream to `sys.stderr`.
    """
    logging = sys.modules.get("logging")
    if logging is None:
        return
    for reference in list(logging._handlerList):  # noqa: SLF001 - the only list of handlers that have no name
        handler = reference()
        new = streams.get(getattr(handler, "stream", None))  # type: ignore[arg-type]
        if handler is not None and new is not None and isinstance(handler, logging.StreamHandler):
            handler.stream = new
