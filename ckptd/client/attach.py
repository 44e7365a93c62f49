"""`ckptd.attach`: a rank takes its place in a job and gets its state back."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from typing import Any, NamedTuple

from ckptd.client.embedded import pick_framework, reach_agent
from ckptd.client.framework import Framework
from ckptd.client.guard import say
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
    **state: Any,
) -> Run:
    """Attach this rank's training state to its job, and restore it when there is something to restore.

    `state` are the objects to checkpoint, under names of your choice: anything with `state_dict` and
    `load_state_dict`, tensors, and nested containers of tensors and plain values. `rng` adds the random number
    generators of Python, NumPy and torch. `job`, `store` and `every` ("30s") matter only where no supervisor has set
    them; they default to the script's name, `$CKPTD_STORE` or a folder below `$CKPTD_HOME`, and 30 s.

    Returns a `Run`, to be used as a context manager. Raises `StateError` for state that can't be captured or does
    not fit what is restored, `DamagedError` when checkpoints exist and none can be read, and `MemoryBudgetError` when
    the slots don't fit: all before the first step. An agent that can't be reached costs protection, not the training,
    unless `strict`.
    """
    return begin(job=job, store=store, every=every, strict=strict, rng=rng).attach(**state)


def begin(*, job: str | None, store: str | None, every: str | float | None, strict: bool, rng: bool) -> Run:
    """Return a run whose objects are still to be attached; `@resumable` hands it to the decorated function."""
    _refuse_a_second_run()
    run = Run(strict=strict)

    def bind(state: dict[str, Any]) -> None:
        _refuse_a_second_run()
        try:
            place = _place(job)
            channel, welcome = reach_agent(endpoint.socket_path(os.environ), may_start=not place.generation)
            session = Session(channel)
            try:
                _join(
                    run,
                    session,
                    place,
                    state,
                    target=pick_framework(welcome.frameworks),
                    rng=rng,
                    store=store,
                    every=every,
                )
            except BaseException as error:
                _give_up(session, place, error)
                run._unprotect()  # noqa: SLF001 - the same package
                raise
        except (AgentError, ProtocolError) as error:
            if strict:
                raise
            say(f"{error}")
            say("training goes on UNPROTECTED: nothing will be checkpointed")
            run.state = dict(state)

    run._bind = bind  # noqa: SLF001 - the same package
    return run


def _refuse_a_second_run() -> None:
    if current_run() is not None:
        raise ConfigError("this process has a run already", hint="attach all state in one call, once per process")


class _Place(NamedTuple):
    """Which rank of which job this process is, as its environment says; `generation` is 0 without supervisor."""

    job: str
    rank: int
    world_size: int
    generation: int


def _place(job: str | None) -> _Place:
    generation = _number("CKPTD_GENERATION", 0)
    # A supervisor has named the job already, and its name holds.
    name = job if job and not generation else os.environ.get("CKPTD_JOB") or job or _script_name()
    return _Place(name, _number("RANK", 0), _number("WORLD_SIZE", 1), generation)


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
    rng: bool,
    store: str | None,
    every: str | float | None,
) -> None:
    binding = load_framework(target).bind(state, rng=rng)
    binding.prepare()  # what can't be captured is refused now, not an interval into the training
    options = {} if place.generation else _options(store, every)
    session.join(m.Join(place.job, place.rank, place.world_size, place.generation, options))
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


def _options(store: str | None, every: str | float | None) -> dict[str, Any]:
    from ckptd.units import parse_duration  # noqa: PLC0415 - only a rank without supervisor needs it

    environ = os.environ
    place = store or environ.get("CKPTD_STORE") or os.path.join(endpoint.home(environ), "store")
    interval = every if every is not None else environ.get("CKPTD_EVERY", "30s")
    options: dict[str, Any] = {
        "store": place if "://" in place else os.path.abspath(place),
        "every_s": float(interval) if isinstance(interval, (int, float)) else parse_duration(interval, "every"),
    }
    return options


def _script_name() -> str:
    stem = os.path.splitext(os.path.basename(sys.argv[0] or "python"))[0]
    return re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("-._") or "python"
