"""Gathers the evidence of a failure into the incident's folder, in bounded time and size.

What is gathered can hang as the ranks do: a GPU's driver, a disk, a file of the kernel's. So each step runs in a thread
of its own, all at once, and what has not come back when time is up is left behind, and said.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from ckptd.core.policy.findings import Findings, judge
from ckptd.daemon.evidence import folders, kernel
from ckptd.daemon.evidence.looking import Looks
from ckptd.daemon.evidence.machine import gpus, kernel_log, machine
from ckptd.daemon.evidence.order import Bundle, Order, RankView
from ckptd.daemon.evidence.output import output, pages
from ckptd.daemon.evidence.pieces import Part, Piece, fit, text_piece
from ckptd.daemon.evidence.summary import incident, summary
from ckptd.daemon.evidence.traces import traces
from ckptd.errors import AgentError, CkptdError
from ckptd.storage.pacing import be_nice

__all__ = ["Bundle", "Order", "RankView", "collect"]

Step = Callable[[], Part]
_FOR_WRITING = 0.15
"""The share of the time that is kept for writing it down."""
_SUMMARY_BYTES = 64 * 1024
"""Kept free for the index, which is written last."""


def collect(order: Order) -> Bundle:
    """Gather what can be had of a failure, and say which rank the others wait for. Blocks; to be called in a thread.

    It comes back after `order.deadline_s` at the latest, whatever hangs. Raises `CkptdError` when nothing can be
    written to the folder; whatever else is missing is said in `summary.txt`.
    """
    began_s, gathered_at = time.monotonic(), time.time()
    until_s = began_s + order.deadline_s * (1 - _FOR_WRITING)
    looks = Looks(order.ranks, until_s)
    parts, missing = _gather(_steps(order, looks, until_s), until_s, gently=order.gently)
    findings = judge(list(looks.found.values()))
    pieces = [piece for part in parts for piece in part.pieces]
    missing += [text for part in parts for text in part.missing]
    kept, cut = fit([*incident(order, findings, gathered_at), *pieces], order.max_bytes - _SUMMARY_BYTES)
    seconds = time.monotonic() - began_s
    index = summary(order, findings, kept, [*missing, *cut], gathered_at=gathered_at, seconds=seconds)
    _write(order, [*kept, index], began_s + order.deadline_s)
    return Bundle(order.folder, dict(findings.lines), _culprit(order, findings))


def _culprit(order: Order, findings: Findings) -> int | None:
    return findings.culprit if order.evidence.rank is None or findings.culprit is not None else order.evidence.rank


def _steps(order: Order, looks: Looks, until_s: float) -> Mapping[str, Step]:
    """Return what is to be done, what matters most first: that has the first claim to the room there is."""
    ranks = list(order.ranks)
    places = [order.folder.parent, *(view.out.parent for view in ranks if view.out is not None)]
    return {
        "stacks of the ranks": looks.look,
        "control pages": lambda: pages(ranks),
        "what the ranks printed": lambda: output(ranks, order.max_bytes // 4),
        "state of the processes": lambda: _processes(ranks),
        "the kernel's log": kernel_log,
        "the machine": lambda: machine(places),
        "the GPUs": lambda: gpus(until_s),
        "traces of collectives": lambda: traces(ranks, until_s),
    }


def _processes(ranks: list[RankView]) -> Part:
    pieces = []
    for view in ranks:
        text = kernel.describe(view.pid)
        if text:
            about = f"what the kernel says of rank {view.rank}: status, stack in the kernel, io, limits, threads"
            pieces.append(text_piece(f"rank-{view.rank:05d}.proc", text, about))
    return Part(tuple(pieces))


def _gather(steps: Mapping[str, Step], until_s: float, *, gently: bool) -> tuple[list[Part], list[str]]:
    """Take all steps at once; return what came of them by `until_s`, in their order, and what did not come."""
    done: dict[str, Part] = {}
    problems: dict[str, str] = {}

    def take(name: str, step: Step) -> None:
        if gently:
            be_nice()
        try:
            done[name] = step()
        except (OSError, ValueError, RuntimeError) as error:
            problems[name] = f"{name}: {error!r}"

    threads = []
    for name, step in steps.items():
        thread = threading.Thread(target=take, args=(name, step), daemon=True, name="ckptd-evidence")
        try:
            thread.start()
        except RuntimeError as error:  # a node on which processes are too many may fail for that very reason
            problems[name] = f"{name}: {error}"
        else:
            threads.append(thread)
    for thread in threads:
        thread.join(max(0.0, until_s - time.monotonic()))
    missing = [problems.get(name, f"{name}: not there when time was up") for name in steps if name not in done]
    return [done[name] for name in steps if name in done], missing


def _write(order: Order, pieces: list[Piece], until_s: float) -> None:
    """Write everything down, which a disk that hangs must not hold up."""
    failed: list[CkptdError] = []

    def write() -> None:
        try:
            folders.write(order.folder, pieces)
        except AgentError as error:
            failed.append(error)
        folders.prune(order.folder.parent)

    thread = threading.Thread(target=write, daemon=True, name="ckptd-evidence")
    try:
        thread.start()
    except RuntimeError as error:
        hint = "there may be too many processes, or too little memory"
        raise AgentError(f"evidence was not written to {order.folder}: {error}", hint=hint) from error
    thread.join(max(0.0, until_s - time.monotonic()))
    if failed:
        raise failed[0]
    if thread.is_alive():
        raise AgentError(f"evidence was not written to {order.folder} in time", hint="its disk may hang")
