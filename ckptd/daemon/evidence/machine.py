"""What the machine says of itself: load, memory, disks, the kernel's log, and its GPUs where it has some."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ckptd.daemon.evidence.pieces import Part, Piece, read_head, text_piece

_RECORD_BYTES = 8192
_LOG_RECORDS = 400
_XID = re.compile(r"NVRM: Xid|NVRM:.*\bfallen off the bus\b|nvidia-.*\bXid\b")
_FILES = ("loadavg", "uptime", "meminfo", "pressure/cpu", "pressure/memory", "pressure/io", "mounts")
_GIB = 2**30


def machine(places: Iterable[Path]) -> Part:
    """Return load, memory and the room on the disks that `places` lie on."""
    parts = [f"kernel {os.uname().release}, {os.cpu_count()} processors, this process may use {_processors()}\n"]
    for name in _FILES:
        text = read_head(Path("/proc") / name)
        if text is not None:
            parts.append(f"== /proc/{name} ==\n{text.rstrip()}\n")
    rooms = "\n".join(_room(place) for place in dict.fromkeys(places))
    parts.append(f"== room on disks ==\n{rooms}\n")
    return Part((text_piece("machine.txt", "\n".join(parts), "load, memory, mounts and room on the disks"),))


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def _room(place: Path) -> str:
    try:
        usage, inodes = shutil.disk_usage(place), os.statvfs(place)
    except OSError as error:
        return f"{place}: {error.strerror}"
    return (
        f"{place}: {usage.free / _GIB:.2f} GiB free of {usage.total / _GIB:.2f} GiB, "
        f"{inodes.f_favail} inodes free of {inodes.f_files}"
    )


def kernel_log(path: Path = Path("/dev/kmsg")) -> Part:
    """Return the end of the kernel's log, and what it says of GPUs (Xid errors)."""
    records: deque[str] = deque(maxlen=_LOG_RECORDS)
    xids: list[str] = []
    try:
        with _opened(path) as descriptor:
            for record in _records(descriptor):
                records.append(record)
                if _XID.search(record):
                    xids.append(record)
    except OSError as error:
        return Part((), (f"kernel's log: {path}: {error.strerror}",))
    now = f"read at {time.monotonic():.3f} s since the boot\n"
    pieces = [text_piece("kernel.log", now + "\n".join(records) + "\n", "the end of the kernel's log")]
    if xids:
        pieces.append(text_piece("xids.txt", "\n".join(xids) + "\n", "what the NVIDIA driver reported (Xid errors)"))
    return Part(tuple(pieces))


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _records(descriptor: int) -> Iterator[str]:
    """Yield what the kernel's log holds now: the seconds since the boot, and the text."""
    while True:
        try:
            data = os.read(descriptor, _RECORD_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EPIPE:  # records were written over meanwhile
                raise
            continue
        if not data:
            return
        head, _, text = data.decode(errors="replace").partition(";")
        fields = head.split(",")
        at_s = int(fields[2]) / 1e6 if len(fields) > 2 and fields[2].isdecimal() else 0.0
        yield f"[{at_s:12.6f}] {text.splitlines()[0] if text else ''}"


def gpus(until_s: float) -> Part:
    """Return what `nvidia-smi -q` says, by monotonic `until_s`; nothing where there is no such program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Part()
    try:
        done = subprocess.run(
            [program, "-q"], capture_output=True, timeout=max(0.1, until_s - time.monotonic()), check=False
        )
    except subprocess.TimeoutExpired:
        return Part((), ("nvidia-smi -q: did not come back in time, which by itself points to a GPU or its driver",))
    except OSError as error:
        return Part((), (f"nvidia-smi -q: {error.strerror}",))
    output = done.stdout or done.stderr
    missing = () if done.returncode == 0 else (f"nvidia-smi -q: ended with {done.returncode}",)
    return Part((Piece("nvidia-smi.txt", output, "what nvidia-smi -q says of each GPU"),), missing)
