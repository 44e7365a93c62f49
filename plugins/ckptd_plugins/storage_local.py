"""The local tier as a plugin: plain paths and ``file://`` URLs, and several paths with commas between them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ckptd.errors import ConfigError
from ckptd.places import disks_of
from ckptd.plugin import TierFactory, hookimpl
from ckptd.storage.disk_set import refuse_alone
from ckptd.storage.disks import DisksTier
from ckptd.storage.local import LocalTier
from ckptd.storage.tier import Tier


def open_local(url: str, options: Mapping[str, Any]) -> Tier:
    """Open the folder that a path or ``file://`` URL names, or the folders of several disks."""
    for name in options:
        raise ConfigError(f"a local store has no option {name!r}", hint="it has none of its own")
    paths = (_path_of(url),) if url.startswith("file://") else disks_of(url)
    folders = [Path(path).expanduser().absolute() for path in paths]
    if len(folders) > 1:
        _refuse_same(url, folders)
        return DisksTier(folders)
    alone = LocalTier(folders[0])
    refuse_alone(alone)
    return alone


def _refuse_same(url: str, folders: Sequence[Path]) -> None:
    """Raise `ConfigError` when links lead to one folder: the marks of two disks can't both lie there."""
    seen: dict[str, Path] = {}
    for folder in folders:
        first = seen.setdefault(os.path.realpath(folder), folder)
        if first is not folder:
            raise ConfigError(
                f"store {url!r} names several disks, and {folder} is the same folder as {first}",
                hint="each disk is a folder of its own",
            )


def _path_of(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise ConfigError(
            f"{url} names the host {parts.netloc!r} and no folder of this node",
            hint="write three slashes, file:///data/runs, or just the path",
        )
    return unquote(parts.path)


@hookimpl
def ckptd_tiers() -> list[TierFactory]:
    """Register the local tier."""
    return [TierFactory("local", ("", "file"), open_local)]
