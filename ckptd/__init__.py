"""ckptd: checkpoint-and-restart for GPU training, seen from training code.

    with ckptd.attach(model=model, optimizer=optimizer) as run:
        for step in run.steps(10_000):
            run.report(loss=train_one(step))

Names are loaded on first use, so that `import ckptd` costs a training script next to nothing.
"""

from __future__ import annotations

from ckptd.version import __version__

TYPE_CHECKING = False  # type checkers know this name; importing `typing` for it would cost 10 ms
if TYPE_CHECKING:
    from typing import Any

    from ckptd.client.attach import attach
    from ckptd.client.decorator import resumable
    from ckptd.client.restoring import Restored
    from ckptd.client.run import Run
    from ckptd.errors import CkptdError

__all__ = ["CkptdError", "Restored", "Run", "__version__", "attach", "resumable"]

_HOME = {
    "attach": "ckptd.client.attach",
    "resumable": "ckptd.client.decorator",
    "Run": "ckptd.client.run",
    "Restored": "ckptd.client.restoring",
    "CkptdError": "ckptd.errors",
}


def __getattr__(name: str) -> Any:
    """Import the module behind a public name when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'ckptd' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - the point of this function

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
