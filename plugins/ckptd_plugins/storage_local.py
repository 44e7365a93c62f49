"""The local tier as a plugin: plain paths and ``file://`` URLs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ckptd.errors import ConfigError
from ckptd.plugin import TierFactory, hookimpl
from ckptd.storage.local import LocalTier


def open_local(url: str, options: Mapping[str, Any]) -> LocalTier:
    """Open the folder that a path or ``file://`` URL names."""
    for name in options:
        raise ConfigError(f"a local store has no option {name!r}", hint="it has none of its own")
    path = unquote(urlsplit(url).path) if url.startswith("file://") else url
    return LocalTier(Path(path).expanduser().absolute())


@hookimpl
def ckptd_tiers() -> list[TierFactory]:
    """Register the local tier."""
    return [TierFactory("local", ("", "file"), open_local)]
