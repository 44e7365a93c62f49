"""The values of an imported checkpoint, and which states it is made of. Must not import torch.

Nobody knows any more what objects an imported state was taken from. So its nodes say `ANY`, and a restore gives them
the form of what is bound. The values are the JSON text itself; a capture wraps the same text into what `torch.save`
writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ckptd.errors import ConfigError
from ckptd.storage.image import VALUES_NAME
from ckptd.storage.importing import WHOLE_STATE

TREE_VERSION = 1
ANY = "any"
"""The kind of an object whose class is not known: it fits whatever has such a state."""
RESERVED = "__ckptd__"
METADATA: Mapping[str, str] = {"format": "pt", "ckptd.framework": "torch", "ckptd.tree": str(TREE_VERSION)}
"""What the header of an image says about its contents; `format` is what the safetensors world looks for."""
Item = TypeVar("Item")


def any_object(node: Any) -> tuple[object, ...]:
    """Return the node of a state of whatever is bound under its name."""
    return ("object", ANY, "", node, None)


def pack(
    entries: Iterable[tuple[str, Any]], aliases: Mapping[str, str], views: Mapping[str, tuple[object, ...]]
) -> bytes:
    """Return the values blob of a checkpoint that is not captured from live objects."""
    document = {"version": TREE_VERSION, "entries": list(entries), "aliases": aliases, "views": views}
    return json.dumps(document, separators=(",", ":"), check_circular=False).encode()


def choose(groups: Mapping[str, Item], names: Mapping[str, str], where: str) -> dict[str, Item]:
    """Return what is to become which state; raises `ConfigError` that lists what there is.

    Without `names` every group becomes the state of its name.
    """
    for name in (*names, *(() if names else groups)):
        if name.startswith(RESERVED):
            raise ConfigError(f"a state can't be named {name!r}", hint="give it another name: --as NAME=GROUP")
    if not names:
        return dict(groups)
    found = {}
    for name, group in names.items():
        if group == WHOLE_STATE and len(groups) == 1:
            found[name] = next(iter(groups.values()))
        elif group in groups:
            found[name] = groups[group]
        else:
            raise ConfigError(
                f"{where} has no group {group!r}" if group else f"{where} has {len(groups)} groups, and not one",
                hint=f"--as NAME=GROUP, where groups are: {', '.join(sorted(groups))}",
            )
    return found


def initial_names() -> set[str]:
    """Return the names that no tensor of an image can have."""
    return {VALUES_NAME, "__metadata__"}


def unique(wanted: str, used: set[str]) -> str:
    """Return a name for a tensor in an image that is printable and not `used` yet, and note it as used."""
    name = wanted = (
        wanted if wanted.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in wanted)
    )
    number = 1
    while name in used:
        number += 1
        name = f"{wanted}~{number}"
    used.add(name)
    return name
