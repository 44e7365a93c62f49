"""What torch and NCCL record of collectives: where ranks are told to put it, and how it is fetched.

torch's flight recorder keeps the last collectives of a process group over NCCL. It writes them out when a collective
times out, and when somebody writes to a pipe that it listens on: that works in a process whose threads are all stuck.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ckptd.daemon.evidence.order import RankView
from ckptd.daemon.evidence.pieces import Part, Piece, read_tail

_DUMP = "TORCH_FR_DUMP_TEMP_FILE"
_OLD_DUMP = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
_PIPE = "TORCH_NCCL_DEBUG_INFO_PIPE_FILE"
_LEVEL, _LOG = "NCCL_DEBUG", "NCCL_DEBUG_FILE"
_PREFIX = "collectives-"
_WAIT_S = 2.5
"""torch looks at its pipe once a second."""
_PAUSE_S = 0.05
_SETTLED_S = 0.2
_MAX_DUMP_BYTES = 4 * 2**20
_MAX_LOG_BYTES = 256 * 1024


def trace_env(folder: Path, rank: int, given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that have a rank leave traces of its collectives in `folder`.

    None of them changes what a rank does or prints. What is `given` already, by the user, is left as it is: who asks
    NCCL for more gets it where he asked for it. Older releases of torch know their dumps by another name, of which
    newer ones warn: there it is the user's to set.
    """
    prefix = str(folder / _PREFIX)
    wanted = {} if _OLD_DUMP in given else {_DUMP: prefix}
    if _holds_pipes(folder):
        wanted[_PIPE] = prefix
    if _LEVEL not in given and _LOG not in given:
        wanted |= {_LEVEL: "WARN", _LOG: str(folder / f"nccl-{rank:05d}.log")}
    return {name: value for name, value in wanted.items() if name not in given}


def _holds_pipes(folder: Path) -> bool:
    """Return whether a named pipe can be made there; a rank that can't make its own would end."""
    probe = folder / f"{_PREFIX}probe.pipe"
    try:
        os.mkfifo(probe)
        probe.unlink()
    except OSError:
        return False
    return True


def traces(ranks: list[RankView], until_s: float) -> Part:
    """Fetch the traces that lie beside the ranks' output, having asked for new ones, by monotonic `until_s`."""
    asked_at = time.time()
    folders = {view.rank: view.out.parent for view in ranks if view.out is not None}
    asked = [rank for rank, folder in folders.items() if _ask(folder / f"{_PREFIX}{rank}.pipe")]
    _wait([folders[rank] / f"{_PREFIX}{rank}" for rank in asked], asked_at, min(until_s, time.monotonic() + _WAIT_S))
    pieces: list[Piece] = []
    missing: list[str] = []
    for rank, folder in folders.items():
        dump, log = folder / f"{_PREFIX}{rank}", folder / f"nccl-{rank:05d}.log"
        about = f"the last collectives of rank {rank}, for python -m torch.distributed.flight_recorder.fr_trace"
        with suppress(OSError):
            if dump.stat().st_size > _MAX_DUMP_BYTES:
                missing.append(f"flight recorder of rank {rank}: too large to be copied, see {dump}")
            else:
                pieces.append(Piece(f"flight-recorder-{rank}", dump.read_bytes(), about))
        said = read_tail(log, _MAX_LOG_BYTES)
        if said:
            pieces.append(Piece(log.name, said, f"what NCCL warned of in rank {rank}"))
        if rank in asked and not dump.exists():
            missing.append(f"flight recorder of rank {rank}: it was asked for, and did not come in time")
    return Part(tuple(pieces), tuple(missing))


def _ask(pipe: Path) -> bool:
    """Ask a rank to write out what it has recorded; return whether one listens."""
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.write(descriptor, b"1\n") > 0
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _wait(dumps: list[Path], asked_at: float, until_s: float) -> None:
    """Wait until each dump is newer than the request, and no longer grows."""
    waiting = set(dumps)
    while waiting and time.monotonic() < until_s:
        time.sleep(_PAUSE_S)
        for dump in list(waiting):
            with suppress(OSError):
                written_at = dump.stat().st_mtime
                if written_at >= asked_at - 1 and time.time() - written_at >= _SETTLED_S:
                    waiting.discard(dump)
