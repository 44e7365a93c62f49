"""`ckptctl run`: run a job in the foreground, under an agent that lives in this process."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptd.cli import slurm
from ckptd.cli.common import when
from ckptd.config import DEFAULT_PRELOAD, OVERLAPS, AgentConfig, JobConfig, absolute_job, parse_rate, read_origin
from ckptd.core import events as e
from ckptd.daemon.agent import Agent
from ckptd.daemon.supervisor import Supervisor
from ckptd.errors import RESUMABLE, ConfigError
from ckptd.halt_config import HaltConfig, read_halt
from ckptd.log import set_up
from ckptd.numbers_config import read_numbers
from ckptd.process_end import Unawaited
from ckptd.store_config import read_stores
from ckptd.units import parse_duration
from ckptd.watch_config import HangConfig, read_hang

_AT_ONCE = 3
"""The signal that waits for nothing any more."""


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "run",
        help="run a job in the foreground",
        usage="ckptctl run [options] -- COMMAND ARGS...",
        description="Start every rank of a job, checkpoint it while it trains, and restart the whole job from the "
        "newest snapshot when a rank dies. COMMAND is a Python script, -m MODULE, or any program; scripts written "
        "for torchrun run unchanged. Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 stop it at the next boundary, with a "
        "checkpoint that is on the last --store within --grace; exit code 75 then says that the same command goes on. "
        "A second signal ends the ranks and waits for no upload, a third ends everything at once.",
    )
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="how many ranks (default 1)")
    parser.add_argument("--every", default="30s", metavar="TIME", help='between checkpoints, like "5s" (default 30s)')
    parser.add_argument(
        "--store",
        action="append",
        metavar="PLACE",
        help="where checkpoints go: a path, several disks as PATH,PATH, or a URL; several times, fastest first "
        "(default ./runs)",
    )
    parser.add_argument(
        "--resume-from",
        metavar="PLACE/JOB",
        help="begin with the newest checkpoint of that job, like s3://bucket/runs/gpt, when there is none in --store; "
        "it is only read",
    )
    parser.add_argument("--resume-step", type=int, metavar="STEP", help="begin with that step of it")
    parser.add_argument("--name", metavar="NAME", help="the job's name (default: the script's)")
    parser.add_argument("--keep-last", type=int, default=3, metavar="N", help="checkpoints to keep (default 3)")
    parser.add_argument(
        "--max-restarts", type=int, default=100, metavar="N", help="restarts to allow in --restart-window (default 100)"
    )
    parser.add_argument(
        "--restart-window", default="24h", metavar="TIME", help="how long a restart counts (default 24h)"
    )
    parser.add_argument(
        "--check-wait",
        default="5m",
        metavar="TIME",
        help="how long a start waits for its node to be fit: disk, memory, ports, GPUs (default 5m)",
    )
    parser.add_argument(
        "--preload",
        default=",".join(DEFAULT_PRELOAD),
        metavar="MODULES",
        help=f"imported once, before the ranks are forked (default {','.join(DEFAULT_PRELOAD)})",
    )
    parser.add_argument("--no-preload", action="store_true", help="start every rank by plain exec")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="the interpreter of the ranks")
    _add_speed(parser)
    parser.add_argument(
        "--numbers",
        default="warn",
        metavar="POLICY",
        help="what a reported NaN, infinity or spike means: warn, step_back (restart from the newest healthy "
        'checkpoint) or off, and more like "step_back,metric=loss,window=128,zscore=10,healthy=3" (default warn)',
    )
    parser.add_argument(
        "--hang",
        metavar="BOUNDS",
        help='how long a rank may go without a sign of life, like "floor=5s,ceiling=10m,first=10m" (the default; the '
        "first step has a bound of its own, for all others the limit is learned between floor and ceiling); or off",
    )
    _add_halt(parser)
    parser.add_argument("--allow-chaos", action="store_true", help="let `ckptctl chaos` do harm to this job")
    parser.add_argument("--log-format", choices=("auto", "console", "json"), help="how ckptd logs (default auto)")
    parser.set_defaults(verb=run)


def _add_speed(parser: argparse.ArgumentParser) -> None:
    """Add what trades memory, bandwidth and training time for each other."""
    parser.add_argument(
        "--slots",
        type=int,
        default=2,
        metavar="N",
        help="snapshots in memory per rank (default 2; with 1 a restart during a capture reads the disk)",
    )
    parser.add_argument(
        "--overlap",
        choices=OVERLAPS,
        default=os.environ.get("CKPTD_OVERLAP") or OVERLAPS[0],
        help="copy parameters and optimizer state beside the next step (default auto: what costs the job less)",
    )
    parser.add_argument(
        "--flush-max", default="0", metavar="RATE", help='what flushes may write, like "500MB/s" (default: no limit)'
    )
    parser.add_argument(
        "--plain-files", action="store_true", help="write every tensor each time, also those that have not changed"
    )


def _add_halt(parser: argparse.ArgumentParser) -> None:
    """Add when the job stops by itself."""
    group = parser.add_argument_group("leaving on purpose")
    group.add_argument("--grace", metavar="TIME", help="how long a stop may take, uploads and all (default 60s)")
    group.add_argument(
        "--time-limit",
        metavar="TIME",
        help='how long this run may take, like "3h50m"; in a SLURM job its end counts too. The job stops so long '
        "before as one interval, two steps, a capture, a flush and two uploads take here",
    )
    group.add_argument("--time-margin", metavar="TIME", help="and so much longer before (default 10s)")
    group.add_argument("--halt-after-step", type=int, metavar="N", help="stop after step N")
    group.add_argument("--halt-at", metavar="MOMENT", help='stop at a moment, like "2026-12-01T06:00" (local time)')
    group.add_argument(
        "--preempt-notice",
        metavar="NOTICE",
        help="stop when file:PATH appears, or when a command ends with 0, which is run every 5 s",
    )
    group.add_argument(
        "--stop-on",
        default="USR1,USR2",
        metavar="SIGNALS",
        help='further signals that stop the job (default USR1,USR2; "" for none)',
    )


def run(options: argparse.Namespace) -> int:
    """Run the job to its end."""
    numbers = _signals(options.stop_on)
    config = _job_config(options)
    agent_config = AgentConfig.from_environ(os.environ)
    place = agent_config.home / "agents" / f"{os.getpid()}.sock"
    agent_config = dataclasses.replace(agent_config, socket=place)
    set_up(options.log_format or agent_config.log_format, debug=options.debug)
    _sweep(place.parent)
    end, status = asyncio.run(_serve(agent_config, config, numbers))
    if end.error is not None:
        if end.exception is not None and end.exception.error is None:
            print(f"\nThe rank's traceback:\n{end.exception.traceback}", file=sys.stderr)
        raise end.error
    if end.outcome == "stopped":
        print(f"ckptctl: {_stopped(status)}", file=sys.stderr)
        return RESUMABLE
    return 0


def _stopped(status: Mapping[str, Any]) -> str:
    """Say why a job has stopped, and with what the next run of it begins."""
    why, last = status["halt"]["stopping"], status["last_committed"]
    newest = "it" if last is None else f"step {last['step']} from {last['tier']}"
    return f"job {status['job']} is stopped{f' ({why})' if why else ''}; the same command goes on with {newest}"


def _job_config(options: argparse.Namespace) -> JobConfig:
    command = tuple(options.command_line)
    if not command:
        raise ConfigError("no command is given", hint="put it behind --, like: ckptctl run --nproc 2 -- train.py")
    preload = () if options.no_preload else tuple(name for name in options.preload.split(",") if name)
    config = JobConfig(
        name=options.name or job_name(command),
        command=command,
        stores=read_stores(options.store or ["./runs"], options.keep_last),
        nproc=options.nproc,
        every_s=parse_duration(options.every, "--every"),
        max_restarts=options.max_restarts,
        restart_window_s=parse_duration(options.restart_window, "--restart-window"),
        check_wait_s=parse_duration(options.check_wait, "--check-wait"),
        preload=preload,
        python=options.python,
        cwd=str(Path.cwd()),
        slots=options.slots,
        reuse_unchanged=not options.plain_files,
        flush_max_bytes_per_s=parse_rate(options.flush_max, "--flush-max"),
        overlap=options.overlap,
        resume_from=None if options.resume_from is None else read_origin(options.resume_from),
        resume_step=options.resume_step,
        chaos=options.allow_chaos,
        numbers=read_numbers(options.numbers),
        hang=HangConfig() if options.hang is None else read_hang(options.hang),
        halt=_halt_config(options),
    )
    return absolute_job(config, Path.cwd())


def _halt_config(options: argparse.Namespace) -> HaltConfig:
    """Return when the job stops by itself; in a SLURM job the end of that counts too."""
    said = {
        "grace": options.grace,
        "margin": options.time_margin,
        "time_limit": options.time_limit,
        "after_step": options.halt_after_step,
        "at": options.halt_at,
        "ends_at": slurm.end_time(os.environ),
        "preempt_notice": options.preempt_notice,
    }
    config = read_halt(said)
    if config.at is not None and config.at <= time.time():
        hint = "the job would stop at once, and whoever starts it again for its exit code would do so for ever"
        raise ConfigError(f"--halt-at is {when(config.at)}, which is over", hint=hint)
    return config


def job_name(command: tuple[str, ...]) -> str:
    """Return the default name of a job: its script's or module's."""
    target = command[1].rpartition(".")[2] if command[0] == "-m" and len(command) > 1 else Path(command[0]).stem
    return re.sub(r"[^A-Za-z0-9._-]", "-", target).lstrip("-._") or "job"


def _signals(text: str) -> list[signal.Signals]:
    """Return the signals that stop the job."""
    found = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    for name in filter(None, (part.strip().upper().removeprefix("SIG") for part in text.split(","))):
        try:
            found.append(signal.Signals[f"SIG{name}"])
        except KeyError as error:
            raise ConfigError(f"--stop-on names no signal: {name}", hint="write it like USR1,USR2") from error
    fixed = [number.name for number in found if number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD)]
    if fixed:
        raise ConfigError(f"--stop-on names {fixed[0]}, which can't be used", hint="write it like USR1,USR2")
    return found


async def _serve(
    agent_config: AgentConfig, config: JobConfig, numbers: Sequence[signal.Signals]
) -> tuple[e.End, dict[str, Any]]:
    asyncio.get_running_loop().set_default_executor(Unawaited())
    agent = Agent(agent_config, foreground=True, on_agent_loss="end")
    try:
        job = agent.submit(config)
        loop, came = asyncio.get_running_loop(), 0

        def stop(number: signal.Signals) -> None:
            nonlocal came
            came += 1
            _stop(job, number)
            for item in numbers if came >= _AT_ONCE else ():
                loop.remove_signal_handler(item)  # should even that hang, one more signal kills

        for number in numbers:
            loop.add_signal_handler(number, stop, number)
        return await job.ended, job.status()
    finally:
        await agent.close()


def _stop(job: Supervisor, number: signal.Signals) -> None:
    again = job.stopping
    if number == signal.SIGINT and not again:
        print(
            "\nckptctl: stopping at the next boundary, with a checkpoint; Ctrl-C again stops at once", file=sys.stderr
        )
    job.stop(job.config.halt.grace_s, checkpoint=not again, reason=f"{number.name} came")


def _sweep(folder: Path) -> None:
    """Remove sockets that killed agents left behind."""
    for path in (*folder.glob("*.sock"), *folder.glob("*.held")):
        if path.stem.isdigit() and not Path(f"/proc/{path.stem}").exists():
            path.unlink(missing_ok=True)
