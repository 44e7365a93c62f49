"""What an integration implements so that a rank can capture and restore a framework's objects.

The client is stdlib only and knows no tensor. The agent names the registered frameworks in its welcome, and the rank
imports the one whose `trigger` module the user's code has imported. `ckptd_integrations.torch` is the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class Membership(NamedTuple):
    """Which rank this is, of how many, and which of its named objects every rank holds alike.

    `replicated` are names that the user said are the same on all ranks; None leaves it to the framework to find those
    of which it is sure.
    """

    rank: int
    world_size: int
    replicated: tuple[str, ...] | None = None


class OfferedCheckpoint(Protocol):
    """A checkpoint or snapshot that this rank may begin with."""

    document: Mapping[str, Any]
    """Its manifest's JSON object (`ckptd.storage.manifest`). Digests are None in one that was not digested yet."""
    in_memory: bool
    """Whether its files are slots: shared memory, without the rules of disks."""

    def open(self, files: Sequence[str]) -> Mapping[str, int]:
        """Return descriptors to read from, by file as the manifest names it; they are closed after the restore."""
        ...


class PendingImage(Protocol):
    """An image whose rest is copied in the background, from tensors that only an optimizer's step changes."""

    @property
    def done(self) -> bool:
        """Whether every byte is there; asking costs microseconds."""
        ...

    def finish(self) -> None:
        """Wait until every byte is there and prove that nothing changed underneath; called by the training thread.

        Raises `StateError` naming what was changed; then the image is void. Afterwards nothing refers to the slot.
        """
        ...


class PreparedImage(Protocol):
    """The state of one boundary, collected but not yet copied."""

    @property
    def image_bytes(self) -> int:
        """How large a slot this needs."""
        ...

    def write(self, slot: memoryview) -> None:
        """Write the complete shard image to the start of `slot`, which is writable and large enough.

        No view of `slot` may outlive the call, but for one that keeps page-locked memory mapped until it is unlocked.
        """
        ...

    def begin(self, slot: memoryview) -> PendingImage | None:
        """Write what may change at any time, and begin to copy what only an optimizer's step changes.

        Returns None when the image is complete already. Otherwise no optimizer may step before `finish` of what is
        returned, and `slot` must stay mapped until then. Raises as `write` does.
        """
        ...

    def witness(self) -> Mapping[str, str]:
        """Return digests of a few replicated tensors, chosen alike by all ranks, to prove that they are the same.

        Empty when nothing is shared out. Called while the tensors still are what was captured.
        """
        ...


class PendingNumber(Protocol):
    """A number on its way from a device to main memory."""

    @property
    def done(self) -> bool:
        """Whether it is there; asking costs microseconds."""
        ...

    def value(self) -> float:
        """Wait for it, and return it."""
        ...


class Binding(Protocol):
    """The user's named objects, bound once at attach."""

    state: dict[str, Any]
    """The objects by name; `run.state` is this dict, and a value reassigned in it is what the next capture sees."""
    overlaps_by_default: bool
    """Whether a background copy is cheaper than one at the boundary as far as one can know (a device's own engine
    does it), so that there is nothing to measure."""

    def prepare(self, step: int, *, whole: bool = False) -> PreparedImage:
        """Collect what has to be captured at the boundary of `step`.

        With `whole`, replicated tensors are not shared out: this rank's image holds all of them, as its own. Raises
        `StateError` naming the key and type of what can't be captured.
        """
        ...

    def before_optimizer_steps(self, wait: Callable[[], None]) -> None:
        """Have `wait` called before every optimizer's step from now on, on the thread that steps.

        It is not called while a device itself orders the step after the copy.
        """
        ...

    def number(self, value: object) -> PendingNumber | None:
        """Have a reported number brought to main memory without waiting for the device that computes it.

        None when `value` lies on no device: `float` reads it at once, if it is a number. Raises `TypeError` for what
        can't be read like that.
        """
        ...

    def count_waits(self, add: Callable[[int], None]) -> None:
        """Have `add` told, in nanoseconds, how long this rank waits for other ranks, each time that it has waited.

        Only where that is known for less than 2 µs a step; a framework that can't tell never calls it.
        """
        ...

    def restore(self, offered: OfferedCheckpoint) -> None:
        """Fill the bound objects in place from the parts that this rank needs, each checked against its digest.

        Raises `StateError` that names the tensor and both shapes when the state does not fit, before anything was
        changed, and `DamagedError` when a digest differs: then objects may be filled in part.
        """
        ...

    def close(self) -> None:
        """Undo what binding has changed in the framework."""
        ...


class Framework(Protocol):
    """An integration's entry: binds objects."""

    def bind(self, state: Mapping[str, Any], *, rng: bool, membership: Membership) -> Binding:
        """Bind the user's named objects; `rng` asks to capture the process's random number generators as well."""
        ...
