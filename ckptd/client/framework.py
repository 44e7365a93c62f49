"""What an integration implements so that a rank can capture and restore a framework's objects.

The client is stdlib only and knows no tensor. The agent names the registered frameworks in its welcome, and the rank
imports the one whose `trigger` module the user's code has imported. `ckptd_integrations.torch` is the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class PreparedImage(Protocol):
    """The state of one boundary, collected but not yet copied."""

    @property
    def image_bytes(self) -> int:
        """How large a slot this needs."""
        ...

    def write(self, slot: memoryview) -> None:
        """Write the complete shard image to the start of `slot`, which is writable and large enough.

        No view of `slot` may outlive the call.
        """
        ...


class Binding(Protocol):
    """The user's named objects, bound once at attach."""

    state: dict[str, Any]
    """The objects by name; `run.state` is this dict, and a value reassigned in it is what the next capture sees."""

    def prepare(self) -> PreparedImage:
        """Collect what has to be captured now; raises `StateError` naming the key and type that can't be."""
        ...

    def restore(self, image: memoryview, digests: Mapping[str, str] | None) -> None:
        """Fill the bound objects in place from `image`, after checking `digests` when there are any.

        Raises `StateError` that names the tensor and both shapes when the state does not fit, and `DamagedError`
        when a digest differs; in both cases before anything was changed.
        """
        ...


class Framework(Protocol):
    """An integration's entry: binds objects."""

    def bind(self, state: Mapping[str, Any], *, rng: bool) -> Binding:
        """Bind the user's named objects; `rng` asks to capture the process's random number generators as well."""
        ...
