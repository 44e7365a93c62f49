"""A framework whose copies a test holds up and disturbs; it knows bytes and JSON.

Every `bytearray` among the objects is a tensor that only `FakeBinding.optimizer_step` may change, everything else is a
plain value. `FAULTS` makes a step of it fail. An image is the length of its head, the head as JSON, and the tensors.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ckptd.client.framework import Membership, OfferedCheckpoint
from ckptd.errors import DamagedError, StateError

TARGET = f"{__name__}:FakeFramework"
FAULTS: dict[str, Callable[[], object]] = {}
"""By "prepare", "write", "begin", "finish", "witness", "restore" or "close": called there, to raise or to look."""
BOUND: list[FakeBinding] = []
"""The bindings of the present test, the latest last."""
HEAD_BYTES = 1000
ALONE = Membership(0, 1)


def fault(where: str) -> None:
    """Do what the test wants done here."""
    if where in FAULTS:
        FAULTS[where]()


class FakeFramework:
    """The `Framework`."""

    def bind(self, state: Mapping[str, Any], *, rng: bool, membership: Membership) -> FakeBinding:
        """Bind the named objects."""
        binding = FakeBinding(dict(state), rng=rng, membership=membership)
        BOUND.append(binding)
        return binding


class FakeNumber:
    """A number on a device, which is `done` when the test says so."""

    def __init__(self, value: float) -> None:
        self.done = False
        self._value = value

    def value(self) -> float:
        """Return it."""
        return self._value


class FakeBinding:
    """The `Binding`. Its background copies wait until the test lets them go, unless `held` is False."""

    overlaps_by_default = False

    def __init__(self, state: dict[str, Any], *, rng: bool = False, membership: Membership = ALONE) -> None:
        self.state = state
        self.rng = rng
        self.membership = membership
        self.held = False
        self.whole_bytes = 0
        self.hooks: list[Callable[[], None]] = []
        self.add_wait: Callable[[int], None] | None = None
        self.images: list[FakeImage] = []
        self.copies: list[FakeCopy] = []
        self.closed = 0
        self.locks = False
        self.locked: dict[int, Any] = {}
        """What keeps slots mapped once `locks` is set, by address."""

    def prepare(self, step: int, *, whole: bool = False) -> FakeImage:
        """Collect the state; a value that JSON can't hold is refused by name."""
        fault("prepare")
        for name, value in self.state.items():
            try:
                json.dumps(None if isinstance(value, bytearray) else value)
            except TypeError as error:
                raise StateError(f"state {name!r} is a {type(value).__name__}, which can't be captured") from error
        image = FakeImage(self, step, whole)
        self.images.append(image)
        return image

    def number(self, value: object) -> FakeNumber | None:
        """Take a number that says to be on its way; all others lie in main memory."""
        return value if isinstance(value, FakeNumber) else None

    def before_optimizer_steps(self, wait: Callable[[], None]) -> None:
        """Call it before every step of the optimizer."""
        self.hooks.append(wait)

    def count_waits(self, add: Callable[[int], None]) -> None:
        """Let the test say what was waited."""
        self.add_wait = add

    def optimizer_step(self, contents: bytes | None = None) -> None:
        """Step the way an optimizer does: hooks first, then new contents for the tensors."""
        for hook in self.hooks:
            hook()
        for value in self.state.values():
            if contents is not None and isinstance(value, bytearray):
                value[:] = contents

    def restore(self, offered: OfferedCheckpoint) -> None:
        """Fill the state in place from the document's "files", which hold an image each."""
        for file, descriptor in offered.open(offered.document["files"]).items():
            view = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
            fault("restore")
            if file in offered.document.get("damaged", ()):
                raise DamagedError(f"file {file!r} is not what was captured")
            for name, value in read(view).items():
                if isinstance(value, bytes):
                    if len(self.state[name]) != len(value):
                        raise StateError(f"{name}: {len(self.state[name])} bytes now, {len(value)} before")
                    self.state[name][:] = value
                else:
                    self.state[name] = value

    def close(self) -> None:
        """Unhook."""
        self.closed += 1
        self.hooks.clear()
        fault("close")


class FakeImage:
    """The `PreparedImage`. With `whole` it is larger, since nothing is shared out."""

    def __init__(self, binding: FakeBinding, step: int, whole: bool) -> None:
        self._binding = binding
        self.step = step
        self.whole = whole
        self.tensors = {name: value for name, value in binding.state.items() if isinstance(value, bytearray)}
        self.values = {name: value for name, value in binding.state.items() if name not in self.tensors}
        self.places: dict[str, tuple[int, int]] = {}
        end = HEAD_BYTES + (binding.whole_bytes if whole else 0)
        for name, value in self.tensors.items():
            self.places[name] = (end, end + len(value))
            end += len(value)
        self.image_bytes = end

    def _write_head(self, slot: memoryview) -> None:
        head = json.dumps({"tensors": self.places, "values": self.values}).encode()
        slot[:8] = len(head).to_bytes(8, "little")
        slot[8 : 8 + len(head)] = head

    def write(self, slot: memoryview) -> None:
        """Write the image, the way a careless adapter would: with views that a traceback keeps alive."""
        self._write_head(slot)
        for name, (begin, end) in self.places.items():
            place = slot[begin:end]
            place[:] = self.tensors[name]
        fault("write")

    def begin(self, slot: memoryview) -> FakeCopy | None:
        """Write the head, and begin to copy tensors, if there are any."""
        self._write_head(slot)
        fault("begin")
        if not self.tensors:
            return None
        if self._binding.locks:
            anchor = ctypes.c_char.from_buffer(slot)
            self._binding.locked.setdefault(ctypes.addressof(anchor), anchor)
        copy = FakeCopy(self, slot)
        self._binding.copies.append(copy)
        if not self._binding.held:
            copy.gate.set()
        return copy

    def witness(self) -> Mapping[str, str]:
        """Return what the tensors hold now, as if that were a digest."""
        fault("witness")
        return {name: bytes(value[:4]).hex() for name, value in self.tensors.items()} if not self.whole else {}


class FakeCopy:
    """The `PendingImage`: a thread copies once `gate` is set. It knows only addresses; `anchor` keeps them mapped."""

    def __init__(self, image: FakeImage, slot: memoryview) -> None:
        self.gate = threading.Event()
        self.finished = 0
        self._tensors = image.tensors
        self._before = {name: bytes(value) for name, value in image.tensors.items()}
        self.anchor: Any = ctypes.c_char.from_buffer(slot)
        base = ctypes.addressof(self.anchor)
        moves = [(base + begin, image.tensors[name]) for name, (begin, _) in image.places.items()]
        self.thread = threading.Thread(target=_move, args=(self.gate, moves), name="fake copy", daemon=True)
        self.thread.start()

    @property
    def done(self) -> bool:
        """Whether the thread has ended."""
        return not self.thread.is_alive()

    def finish(self) -> None:
        """Wait for the thread, and compare."""
        fault("finish")
        self.thread.join(30)
        assert self.done, "nobody lets the copy go"
        self.finished += 1
        self.anchor = None
        for name, before in self._before.items():
            if self._tensors[name] != before:
                raise StateError(f"tensor {name!r} was changed while it was copied beside training")


def _move(gate: threading.Event, moves: list[tuple[int, bytearray]]) -> None:
    gate.wait()
    for place, value in moves:
        ctypes.memmove(place, bytes(value), len(value))


def read(view: bytes | memoryview) -> dict[str, Any]:
    """Return the state that an image holds."""
    end = 8 + int.from_bytes(view[:8], "little")
    head = json.loads(bytes(view[8:end]))
    return {**head["values"], **{name: bytes(view[begin:end]) for name, (begin, end) in head["tensors"].items()}}


def image_of(state: dict[str, Any]) -> bytes:
    """Return an image of a state."""
    image = FakeBinding(state).prepare(0)
    data = bytearray(image.image_bytes)
    with memoryview(data) as view:
        image._write_head(view)
    for name, (begin, end) in image.places.items():
        data[begin:end] = image.tensors[name]
    return bytes(data)


def let_all_go() -> None:
    """Let every copy run to its end, so that nobody who ends a run has to wait."""
    FAULTS.clear()
    for binding in BOUND:
        for copy in binding.copies:
            copy.gate.set()


@contextmanager
def clean() -> Iterator[None]:
    """Begin and end without faults and bindings, and with no thread of a copy left over."""
    try:
        yield
    finally:
        let_all_go()
        for binding in BOUND:
            for copy in binding.copies:
                copy.thread.join(30)
                copy.anchor = None
        BOUND.clear()
