"""`ckptd.attach`: a rank takes its place in a job and gets its state back."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ckptd.client.embedded import pick_framework, reach_agent
from ckptd.client.framework import Framework, Membership
from ckptd.client.guard import say
from ckptd.client.overlap import SETTINGS
from ckptd.client.reporting import SkipData
from ckptd.client.run import Run, current_run
from ckptd.client.session import Session
from ckptd.errors import AgentError, CkptdError, ConfigError, ProtocolError, StateError
from ckptd.protocol import endpoint
from ckptd.protocol import messages as m


def attach(
    *,
    job: str | None = None,
    store: str | None = None,
    every: str | float | None = None,
    strict: bool = False,
    rng: bool = True,
    overlap: str | None = None,
    replicated: Sequence[str] | None = None,
    resume_from: str | None = None,
    resume_step: int | None = None,
    numbers: str | Mapping[str, Any] | None = None,
    skip_data: SkipData | None = None,
    hang: Mapping[str, str | float] | str | bool | None = None,
    **state: Any,
) -> Run:
    """Attach this rank's training state to its job, and restore it when there is something to restore.

    `state` are the objects to checkpoint, under names of your choice: anything with `state_dict` and
    `load_state_dict`, tensors, and nested containers of tensors and plain values. `rng` adds the random number
    generators of Python, NumPy and torch. `job`, `store` and `every` ("30s") matter only where no supervisor has set
    them; they default to the script's name, `$CKPTD_STORE` or a folder below `$CKPTD_HOME`, and 30 s. So do
    `resume_from` ("s3://bucket/runs/gpt", a place and a job; `$CKPTD_RESUME_FROM`) and `resume_step`: with which
    job's checkpoint to begin when the store holds none of this one; the newest, unless a step is named.

    `overlap` says whether parameters and optimizer state are copied beside the next forward and backward: "on", "off"
    for a copy between two steps, or "auto" (the default, or `$CKPTD_OVERLAP`), which takes what costs this job less.
    `replicated` are names out of `state` whose tensors are the same on all ranks, so that each rank captures only a
    share of them. None leaves it to the framework to find what is certainly so (DistributedDataParallel, DTensor);
    your word is checked while the job runs, by comparing digests across ranks.

    `numbers` says, where no supervisor does, which reported metric is watched and what follows from a bad value:
    "warn" (the default), "step_back" or "off", or a table like {"policy": "step_back", "metric": "loss"}.
    `skip_data(first, last)` is called after the restore, before the first step, once for each range of steps to come
    that the job has stepped back from; the script is to train on nothing in these. `run.skipped` has the same steps.
    `hang` says, where no supervisor does, how long a rank may go without a sign of life before it is killed: False for
    as long as it likes, or a table like {"floor": "5s", "ceiling": "10m", "first": "10m"}, between which the limit is
    learned. It is False for a process that no launcher has started (without `RANK`): nobody would start it again.

    Returns a `Run`, to be used as a context manager. Raises `ConfigError` for arguments that can't be used,
    `StateError` for state that can't be captured or does not fit what is restored, `DamagedError` when checkpoints
    exist and none can be read, `NotFoundError` when there is none to resume from, and `MemoryBudgetError` when the
    slots don't fit: all before the first step. An agent that can't be reached costs protection, not the training,
    unless `strict`.
    """
    options = Options(
        job, store, every, strict, rng, overlap, replicated, resume_from, resume_step, numbers, skip_data, hang
    )
    return begin(options).attach(**state)


class Options(NamedTuple):
    """What a user may say about a run besides its objects: the arguments of `attach`."""

    job: str | None
    store: str | None
    every: str | float | None
    strict: bool
    rng: bool
    overlap: str | None
    replicated: Sequence[str] | None
    resume_from: str | None
    resume_step: int | None
    numbers: str | Mapping[str, Any] | None
    skip_data: SkipData | None
    hang: Mapping[str, str | float] | str | bool | None


def begin(options: Options) -> Run:
    """Return a run whose objects are still to be attached; `@resumable` hands it to the decorated function."""
    _refuse_a_second_run()
    run = Run(strict=options.strict, overlap=_overlap(options.overlap), skip_data=options.skip_data)

    def bind(state: dict[str, Any]) -> None:
        _refuse_a_second_run()
        replicated = _replicated(options.replicated, state)
        session: Session | None = None
        try:
            place = _place(options.job)
            path = endpoint.socket_path(os.environ)
            channel, welcome = reach_agent(path, may_start=not place.generation, wait_s=place.agent_wait_s)
            session = Session(channel, path)
            membership = Membership(place.rank, place.world_size, replicated)
            try:
                target = pick_framework(welcome.frameworks)
                _join(run, session, place, state, target=target, membership=membership, options=options)
            except BaseException as error:
                _give_up(session, place, error)
                run._end()  # noqa: SLF001 - the same package
                raise
        except (AgentError, ProtocolError) as error:
            unread = session is not None and session.offer is not None and run.restored is None
            # To begin anew beside a checkpoint would be worse than to end; and who ends is started again.
            if options.strict or unread or place.agent_wait_s:
                raise
            say(f"{error}")
            say("training goes on UNPROTECTED: nothing will be checkpointed")
            if run.restored is None:
                run.state = dict(state)

    run._bind = bind  # noqa: SLF001 - the same package
    return run


def _overlap(wanted: str | None) -> str:
    where, setting = "overlap", wanted
    if setting is None:
        where, setting = "the environment variable CKPTD_OVERLAP", os.environ.get("CKPTD_OVERLAP") or SETTINGS[0]
    if setting not in SETTINGS:
        raise ConfigError(f"{where} is {setting!r}", hint=f"it is one of {', '.join(SETTINGS)}")
    return setting


def _replicated(names: Sequence[str] | None, state: Mapping[str, Any]) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str):
        raise ConfigError(f"replicated is the text {names!r}", hint=f"it is a sequence of names: ({names!r},)")
    for name in names:
        if name not in state:
            raise ConfigError(
                f"replicated names {name!r}, and nothing of that name is attached",
                hint=f"attached are {', '.join(map(repr, state)) or 'no objects at all'}",
            )
    return tuple(names)


def _refuse_a_second_run() -> None:
    if current_run() is not None:
        raise ConfigError("this process has a run already", hint="attach all state in one call, once per process")


class _Place(NamedTuple):
    """Which rank of which job this process is, as its environment says; `generation` is 0 without supervisor.

    For `agent_wait_s` the job goes on without an agent, whose successor starts ranks again that have ended; 0: not at
    all.
    """

    job: str
    rank: int
    world_size: int
    generation: int
    agent_wait_s: float


def _place(job: str | None) -> _Place:
    generation = _number("CKPTD_GENERATION", 0)
    # A supervisor has named the job already, and its name holds.
    name = job if job and not generation else os.environ.get("CKPTD_JOB") or job or _script_name()
    wait_s = float(_number("CKPTD_AGENT_WAIT", 0)) if generation else 0.0
    return _Place(name, _number("RANK", 0), _number("WORLD_SIZE", 1), generation, wait_s)


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise ConfigError(f"the environment variable {variable} is {text!r}, which is no whole number")
    return int(text)


def _join(
    run: Run,
    session: Session,
    place: _Place,
    state: dict[str, Any],
    *,
    target: str,
    membership: Membership,
    options: Options,
) -> None:
    binding = load_framework(target).bind(state, rng=options.rng, membership=membership)
    run._binding = binding  # noqa: SLF001 - the same package, which ends it with the run
    binding.prepare(0)  # what can't be captured is refused now, not an interval into the training
    wanted = {} if place.generation else _wishes(options)
    incarnation = os.environ.get("CKPTD_INCARNATION", "") if place.generation else ""
    session.join(m.Join(place.job, place.rank, place.world_size, place.generation, wanted, incarnation))
    run._begin(session, binding, (place.job, place.rank))  # noqa: SLF001 - the same package


def _give_up(session: Session, place: _Place, error: BaseException) -> None:
    """Tell the agent why this rank can't begin, if it still listens, and let go of everything."""
    if isinstance(error, CkptdError) and not isinstance(error, (AgentError, ProtocolError)):
        from ckptd.protocol.failure import describe  # noqa: PLC0415 - only a failing rank needs `traceback`

        with contextlib.suppress(CkptdError):
            session.tell(m.Raised(place.job, place.rank, place.generation, describe(error).to_json()))
    session.close()


def load_framework(target: str) -> Framework:
    """Import a framework adapter by "module:attribute"."""
    from importlib import import_module  # noqa: PLC0415 - keeps the client's own import short

    module, _, attribute = target.partition(":")
    try:
        framework: Framework = getattr(import_module(module), attribute)()
    except ImportError as error:
        raise StateError(
            f"the adapter {target} can't be imported: {error}", hint="install ckptd[torch] in this environment"
        ) from error
    return framework


def _wishes(options: Options) -> dict[str, Any]:
    from ckptd.places import absolute_store  # noqa: PLC0415 - only a rank without supervisor needs them
    from ckptd.units import parse_duration  # noqa: PLC0415 - the same

    environ, here = os.environ, os.path.abspath(os.curdir)
    named = options.store or environ.get("CKPTD_STORE")
    interval = options.every if options.every is not None else environ.get("CKPTD_EVERY", "30s")
    wishes: dict[str, Any] = {
        "store": absolute_store(named, here) if named else absolute_store("store", endpoint.home(environ)),
        "every_s": float(interval) if isinstance(interval, (int, float)) else parse_duration(interval, "every"),
    }
    if environ.get("CKPTD_ALLOW_CHAOS") == "1":
        wishes["chaos"] = True
    origin = options.resume_from or environ.get("CKPTD_RESUME_FROM")
    if origin:
        wishes["resume_from"] = absolute_store(origin, here)
    if options.resume_step is not None:
        wishes["resume_step"] = options.resume_step
    if options.numbers is not None:
        wishes["numbers"] = options.numbers if isinstance(options.numbers, str) else dict(options.numbers)
    if options.hang is not None:
        wishes["hang"] = dict(options.hang) if isinstance(options.hang, Mapping) else options.hang
    elif "RANK" not in environ:
        wishes["hang"] = False  # no launcher would start it again, and it may be a notebook or in a debugger
    return wishes


def _script_name() -> str:
    stem = os.path.splitext(os.path.basename(sys.argv[0] or "python"))[0]
    return re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("-._") or "python"
