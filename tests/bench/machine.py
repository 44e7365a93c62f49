"""Which machine figures come from: one line to stand above them."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version


def line() -> str:
    """Return date, cores, memory, kernel, Python and torch."""
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{time.strftime('%d %b %Y %H:%M')}, {os.cpu_count()} cores, {gib:.0f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}, torch {version('torch')}, load {os.getloadavg()[0]:.1f}"
    )
