"""The process's random number generators: Python's, NumPy's if it is loaded, and torch's on CPU and CUDA.

A run that is restored draws the same numbers as one that was never interrupted; without that no dropout mask and no
shuffled order would be the same.
"""

from __future__ import annotations

import importlib
import random
import sys
from typing import Any

import torch

RNG_NAME = "__ckptd__.rng"
"""The name their states have in an image; the user's names can't begin like it."""


def capture_rng() -> dict[str, Any]:
    """Return the states of all generators, without drawing from any."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["numpy"] = numpy.random.get_state(legacy=False)
    cuda: Any = torch.cuda
    if cuda.is_initialized():
        states["cuda"] = cuda.get_rng_state_all()
    return states


def restore_rng(states: dict[str, Any]) -> None:
    """Set the generators to what `capture_rng` returned; devices that are not here any more are left out.

    NumPy is imported for it when the captured run had it: the user's code may import it only later.
    """
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "numpy" in states:
        try:
            numpy: Any = importlib.import_module("numpy")
        except ModuleNotFoundError:
            numpy = None  # What is not installed draws no numbers.
        if numpy is not None:
            numpy.random.set_state(states["numpy"])
    for index, state in enumerate(states.get("cuda", ())[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, index)
