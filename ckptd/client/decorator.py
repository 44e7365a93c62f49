"""`@ckptd.resumable`: a training function that goes on where its last run ended."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from ckptd.client.attach import Options, begin
from ckptd.client.reporting import SkipData
from ckptd.client.run import Run

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_Training = Callable[Concatenate[Run, Parameters], Result]


def resumable(
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
) -> Callable[[_Training[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorate a training function, which gets a `Run` as its first argument and is called without it.

    The function builds its objects and calls `run.attach(model=..., ...)` once; from there on it is the same as in
    a `with ckptd.attach(...)` block. The arguments are those of `ckptd.attach`; the job is named after the function.
    """

    def decorate(train: _Training[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(train)
        def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            name = job or train.__name__.replace("__", "-").strip("_-") or "train"
            options = Options(
                name, store, every, strict, rng, overlap, replicated, resume_from, resume_step, numbers, skip_data, hang
            )
            with begin(options) as run:
                return train(run, *args, **kwargs)

        return wrapper

    return decorate
