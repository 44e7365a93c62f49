"""The texts of a bundle that people read first: `summary.txt` and `incident.json`."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Sequence

from ckptd.core.policy.findings import Findings
from ckptd.daemon.evidence.order import Order
from ckptd.daemon.evidence.pieces import Piece, text_piece
from ckptd.types import Evidence

SUMMARY = "summary.txt"
_WIDTH = 118


def incident(order: Order, findings: Findings, gathered_at: float) -> tuple[Piece, ...]:
    """Return what happened as JSON, and the whole traceback where a rank raised something."""
    evidence = order.evidence
    exception = evidence.exception
    facts = {
        "incident": order.folder.name,
        "job": order.job,
        "generation": order.generation,
        "gathered_at": gathered_at,
        "evidence": {
            "detector": evidence.detector,
            "kind": evidence.kind,
            "rank": evidence.rank,
            "certainty": evidence.certainty,
            "summary": evidence.summary,
            "at_s": evidence.at_s,
            "signal": evidence.signal,
            "returncode": evidence.returncode,
            "exception": None if exception is None else exception.to_json(),
            "facts": list(evidence.facts),
        },
        "finding": {
            "culprit": findings.culprit,
            "reason": findings.reason,
            "ranks": {str(rank): line for rank, line in findings.lines.items()},
        },
        "ranks": [{"rank": view.rank, "pid": view.pid} for view in order.ranks],
    }
    pieces = [text_piece("incident.json", json.dumps(facts, indent=2) + "\n", "all of this for programs")]
    if exception is not None:
        about = f"the whole traceback of what rank {evidence.rank} raised"
        name = "traceback.txt" if evidence.rank is None else f"rank-{evidence.rank:05d}.traceback"
        pieces.append(text_piece(name, exception.traceback.rstrip() + "\n", about))
    return tuple(pieces)


def summary(
    order: Order,
    findings: Findings,
    pieces: Sequence[Piece],
    missing: Sequence[str],
    *,
    gathered_at: float,
    seconds: float,
) -> Piece:
    """Return the index of a bundle: what happened, what each rank did, what each file shows and what is missing."""
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(gathered_at))
    lines = [
        f"Incident {order.folder.name} of job {order.job}, generation {order.generation}",
        f"Gathered at {when} in {seconds:.2f} s",
        "",
        *_wrapped("What happened: ", order.evidence.summary),
        *(line for fact in order.evidence.facts for line in _wrapped("               ", fact)),
        *_wrapped("Finding:       ", _finding(order.evidence, findings)),
        "",
        "What each rank was doing:",
    ]
    steps = {view.rank: view.page.get("STEP") for view in order.ranks if view.page is not None}
    for view in order.ranks:
        head = f"  rank {view.rank}, process {view.pid}, after step {steps.get(view.rank, '?')}: "
        lines += _wrapped(head, findings.lines.get(view.rank, "was not looked at"))
    lines += ["", "Files:"]
    width = max((len(piece.name) for piece in pieces), default=0)
    lines += [f"  {piece.name:<{width}}  {piece.about}" for piece in pieces]
    if missing:
        lines += ["", "Not here:"]
        for text in missing:
            lines += _wrapped("  ", text)
    return text_piece(SUMMARY, "\n".join(lines) + "\n", "this text")


def _finding(evidence: Evidence, findings: Findings) -> str:
    """Say who is to blame; of a rank that has died that is known, and the rest is what the others did then."""
    if evidence.kind in ("hang", "straggler", "stopped"):
        return findings.reason
    if evidence.rank is None:
        return "no rank is to blame; all are shown as they were right after it"
    return f"rank {evidence.rank} failed first; the other ranks are shown as they were right after it"


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(f"{head}{text}", _WIDTH, subsequent_indent=" " * (len(head) if len(head) < 24 else 6))
