"""The last that ranks have printed, and what their control pages said."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ckptd.daemon.evidence.order import RankView
from ckptd.daemon.evidence.pieces import Part, Piece, read_tail, text_piece

_MAX_TAIL_BYTES = 128 * 1024


def output(ranks: Sequence[RankView], max_bytes: int) -> Part:
    """Return the end of stdout and stderr of every rank, all of them within `max_bytes`."""
    tail_bytes = min(_MAX_TAIL_BYTES, max_bytes // max(1, 2 * len(ranks)))
    pieces: list[Piece] = []
    missing: list[str] = []
    for view in ranks:
        for path, name, stream in ((view.out, "out", "stdout"), (view.err, "err", "stderr")):
            if path is None:
                continue
            data = read_tail(path, tail_bytes)
            if data is None:
                missing.append(f"{stream} of rank {view.rank}: {path} can't be read")
            elif data:
                about = f"the last that rank {view.rank} printed to {stream}"
                pieces.append(Piece(f"rank-{view.rank:05d}.{name}", data, about, keep_end=True))
    if ranks and all(view.out is None for view in ranks):
        missing.append("what the ranks printed: another launcher started them, and has it")
    return Part(tuple(pieces), tuple(missing))


def pages(ranks: Sequence[RankView]) -> Part:
    """Return what the control pages said lately, one look a line, and what they say now."""
    lines = []
    for view in ranks:
        lines += [json.dumps(item._asdict()) for item in view.history]
        if view.page is not None:
            lines.append(json.dumps({"rank": view.rank, "now": dict(view.page)}))
    if not lines:
        return Part((), ("control pages: no rank has one",))
    about = "what the control pages said lately: step, last boundary, phase, time waited for others"
    return Part((text_piece("pages.jsonl", "\n".join(lines) + "\n", about),))
