"""The local tier as a plugin: plain paths and ``file://`` URLs."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from ckptd.plugin import TierFactory, hookimpl
from ckptd.storage.local import LocalTier


def open_local(url: str) -> LocalTier:
    """Open the folder that a path or ``file://`` URL names."""
    path = unquote(urlsplit(url).path) if url.startswith("file://") else url
    return LocalTier(Path(path).expanduser().absolute())


@hookimpl
def ckptd_tiers() -> list[TierFactory]:
    """Register the local tier."""
    return [TierFactory("local", ("", "file"), open_local)]
