"""Where checkpoints go, as text: a folder, the folders of several disks with commas between them, or a URL."""

from __future__ import annotations

import itertools
import os

from ckptd.errors import ConfigError


def disks_of(store: str) -> tuple[str, ...]:
    """Return the folders of a store that is a path, or the one place that a URL is.

    Raises `ConfigError` when several can't be meant: one without a name, the same disk twice or one inside another,
    and names of which only some begin at the root, since those are rather one folder with a comma in its name.
    """
    if "://" in store or "," not in store:
        return (store,)
    disks = tuple(store.split(","))
    _require(all(disk.strip() for disk in disks), store, "one of them has no name", "write /nvme0/runs,/nvme1/runs")
    rooted = {os.path.isabs(os.path.expanduser(disk)) for disk in disks}
    _require(len(rooted) == 1, store, "not all of them begin at the root", "a comma in a name: file:///data/a%2Cb")
    folders = sorted(f"{os.path.normpath(disk)}/" for disk in disks)
    for first, second in itertools.pairwise(folders):
        _require(first != second, store, f"{first[:-1]} is named twice", "each disk is a folder of its own")
        _require(not second.startswith(first), store, f"{second[:-1]} lies in {first[:-1]}", "name some side by side")
    return disks


def absolute_store(store: str, folder: str | os.PathLike[str]) -> str:
    """Return a store that means the same from everywhere: URLs stay, paths become absolute.

    Where the folder that a path is seen from has a comma in its name, the path becomes a URL.
    """
    if "://" in store:
        return store
    disks = [os.path.normpath(os.path.join(folder, os.path.expanduser(disk))) for disk in disks_of(store)]
    if not any("," in disk for disk in disks):
        absolute = ",".join(disks)
        disks_of(absolute)
        return absolute
    _require(len(disks) == 1, store, f"{folder} has a comma in its name", "name the disks from the root on")
    from urllib.parse import quote  # noqa: PLC0415 - few need it, and the client's import is short

    return f"file://{quote(disks[0])}"


def _require(holds: bool, store: str, problem: str, hint: str) -> None:
    if not holds:
        raise ConfigError(f"store {store!r} names several disks, and {problem}", hint=hint)
