"""Carries out what `ckptctl chaos` asks for: harm to a job that allows it, and to nothing else.

Signals go to a rank's process alone, as a fault of its own would, through a descriptor that can't come to mean another
process. What happens inside a rank (an exception, NaN, slowness) it does itself when its control page says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ckptd.core.policy.chaos import Fault
from ckptd.daemon.living import started
from ckptd.daemon.supervisor import Supervisor
from ckptd.errors import AgentError, ConfigError
from ckptd.protocol.page import Harm, Word
from ckptd.storage.wrappers import FillableTier
from ckptd.units import show_signal

PATIENCE_S = 120.0
"""How long a fault waits for its ranks to be there, and at its step."""
_POLL_S = 0.002
_LAST_WORD_S = 0.05
"""For the answer to leave before the agent ends itself."""
_MS_PER_S = 1000.0
_HARMS = {"exception": Harm.EXCEPTION, "nan": Harm.NAN, "slow": Harm.SLOW}


async def inflict(job: Supervisor, fault: Fault, *, foreground: bool) -> dict[str, Any]:
    """Do a fault to a job; return {at_s (monotonic), step, generation, what}.

    With `foreground` the agent is a part of `ckptctl run`. Raises `ConfigError` when the job does not allow it, or
    has no such rank, and `AgentError` when the job has ended, or its ranks did not come to the step in time.
    """
    _check(job, fault, foreground=foreground)
    if fault.ranks and fault.kind in _HARMS:
        what = await _arm(job, fault)
    elif fault.ranks:
        what = await _signal(job, fault)
    elif fault.kind == "full-disk":
        what = _fill(job, fault.for_s)
    elif fault.kind == "launcher":
        what = await _end_launcher(job)
    else:
        asyncio.get_running_loop().call_later(_LAST_WORD_S, os.kill, os.getpid(), signal.SIGKILL)
        what = f"the agent (pid {os.getpid()}) is killed"
    generation = job.machine.generation
    steps = [_step(job, rank) for rank in job.attendance.admitted]  # the machine hears of them each tick only
    return {
        "at_s": time.monotonic(),
        "step": max([*steps, 0 if generation is None else generation.newest_step]),
        "generation": 0 if generation is None else generation.number,
        "what": what,
    }


def _check(job: Supervisor, fault: Fault, *, foreground: bool) -> None:
    name, world_size = job.config.name, job.config.nproc
    if not job.config.chaos:
        raise ConfigError(
            f"job {name} does not allow chaos",
            hint="start it with `ckptctl run --allow-chaos`, or with chaos = true in its job file",
        )
    for rank in fault.ranks:
        if not 0 <= rank < world_size:
            raise ConfigError(f"job {name} has no rank {rank}", hint=f"its ranks are 0 to {world_size - 1}")
    if fault.kind == "agent" and foreground:
        raise ConfigError(
            f"the agent of job {name} is `ckptctl run` itself, and nobody would start it again",
            hint="run the job under the daemon: ckptctl submit",
        )
    if fault.kind == "launcher" and job.processes is None:
        raise ConfigError(f"job {name} has a launcher of its own", hint="ckptd can't tell which process that is")
    if fault.kind == "kill" and fault.signal not in signal.valid_signals():
        raise ConfigError(f"there is no signal {fault.signal}")


async def _until(job: Supervisor, condition: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        if job.ended.done():
            raise AgentError(f"job {job.config.name} has ended before {what}")
        if time.monotonic() > end_s:
            raise AgentError(f"job {job.config.name}: {what} did not happen within {PATIENCE_S:g} s")
        await asyncio.sleep(_POLL_S)


# --- signals --------------------------------------------------------------------------------------------------


async def _signal(job: Supervisor, fault: Fault) -> str:
    await _until(job, lambda: _there(job, fault), f"rank {', '.join(map(str, fault.ranks))} was there")
    number = signal.SIGSTOP if fault.kind == "stop" else fault.signal
    for rank in fault.ranks:
        _send(job, rank, number)
    return f"{show_signal(number)} to {_named(fault)}"


def _there(job: Supervisor, fault: Fault) -> bool:
    """Whether the processes of all ranks that a fault hits are there, and as far as it wants them to be."""
    generation = job.machine.generation
    if generation is None or any(rank not in generation.pids or rank in generation.gone for rank in fault.ranks):
        return False
    return fault.step is None or all(_step(job, rank) >= fault.step for rank in fault.ranks)


def _step(job: Supervisor, rank: int) -> int:
    admitted = job.attendance.admitted.get(rank)
    return (admitted.step or 0) if admitted is not None else 0


def _send(job: Supervisor, rank: int, number: int) -> None:
    """Send a signal to a rank's process, which may have ended in this very moment."""
    generation = job.machine.generation
    assert generation is not None
    if job.processes is None:
        if rank in job.attendance.admitted:
            job.attendance.admitted[rank].send_signal(number)
        return
    launcher, pid = job.processes.launcher[0], generation.pids[rank]
    with _pinned(pid) as descriptor:
        if descriptor is not None and _parent(pid) == launcher:
            signal.pidfd_send_signal(descriptor, number)


@contextlib.contextmanager
def _pinned(pid: int) -> Iterator[int | None]:
    """Yield a descriptor of the process that a number stands for now, None when there is none; look at it then."""
    descriptor = None
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
    try:
        with contextlib.suppress(ProcessLookupError):
            yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


async def _end_launcher(job: Supervisor) -> str:
    processes = job.processes
    assert processes is not None
    await _until(job, lambda: bool(processes.launcher[0]), "its launcher was there")
    pid, began = processes.launcher
    with _pinned(pid) as descriptor:
        if descriptor is not None and started(pid) == began:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    return f"SIGKILL to the launcher (pid {pid})"


# --- what ranks do themselves ---------------------------------------------------------------------------------


async def _arm(job: Supervisor, fault: Fault) -> str:
    """Write the fault to the control pages, and wait until every rank has done it, or is gone."""
    await _until(job, lambda: all(map(_trains(job), fault.ranks)), f"ranks {list(fault.ranks)} trained")
    armed = []
    for number in fault.ranks:
        rank = job.attendance.admitted[number]
        assert rank.page is not None
        harm = rank.page.harm(_HARMS[fault.kind], fault.step or 0, _ms(fault.for_s), _ms(fault.pause_s))
        armed.append((rank, harm))
    await _until(
        job,
        lambda: all(rank.page is None or rank.page.words[Word.HARMED] >= harm for rank, harm in armed),
        f"{fault.kind} was done in {_named(fault)}",
    )
    if any(rank.page is not None and rank.page.words[Word.HARMLESS] for rank, _ in armed):
        raise AgentError(
            f"{_named(fault)} of job {job.config.name} could not do {fault.kind}: it has no float tensor",
            hint="choose another --fault, or attach a state that holds one",
        )
    extra = f", {fault.pause_s:g} s more for each step for {fault.for_s:g} s" if fault.kind == "slow" else ""
    return f"{fault.kind} in {_named(fault)}{extra}"


def _trains(job: Supervisor) -> Callable[[int], bool]:
    def trains(rank: int) -> bool:
        generation = job.machine.generation
        return generation is not None and generation.training and rank in job.attendance.admitted

    return trains


def _ms(seconds: float) -> int:
    return max(0, round(seconds * _MS_PER_S))


def _named(fault: Fault) -> str:
    return ("rank " if len(fault.ranks) == 1 else "ranks ") + ", ".join(map(str, fault.ranks))


# --- the disk -------------------------------------------------------------------------------------------------


def _fill(job: Supervisor, for_s: float) -> str:
    first = job.tiers[0]
    if not isinstance(first.tier, FillableTier):
        raise AgentError(f"the first tier of job {job.config.name} can't be told to be full")
    first.tier.fill(for_s)
    return f"{first.name} ({first.tier.url}) says for {for_s:g} s that it is full"
