"""What makes several disks one store: a mark on each, so that a disk that is missing is an error and no empty folder.

The folder that an unmounted disk leaves looks like a store that never held anything, and would be written to. So the
first start puts a mark on every disk, with the name of the set and the disk's place in it, and each later one looks for
them. They are put in two rounds: a set whose second round has begun is complete on every disk, and one that was killed
before holds nothing yet, so it is made anew.

A disk that was really replaced has no mark. When people then remove `.ckptd-disk` from all the others, the next start
makes a new set of what there is; checkpoints that had a file on the lost disk are damaged from then on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ckptd.errors import NotFoundError, RefusedError, StoreError
from ckptd.storage.holding import NO_LOCKS, Holds
from ckptd.storage.local import LocalTier

MARK = ".ckptd-disk"
_LOCK = ".ckptd-hold"
_PATIENCE_S = 10.0
_NEW_SET = f"after a disk was replaced, or to use other disks, remove {MARK} from all: what only a lost one had is lost"


@dataclass(frozen=True, slots=True)
class Mark:
    """What is written on a disk of a set."""

    set: str
    """A name that no other set has."""
    number: int
    """Which of its disks this is, from 1."""
    disks: tuple[str, ...]
    """The folders of all, as they were named when the set was made."""
    is_complete: bool
    """Whether all disks had a mark when this was written."""


def read_mark(disk: LocalTier) -> Mark | None:
    """Return a disk's mark, None when it has none; raises `StoreError` when it can't be read."""
    try:
        found = json.loads(disk.get(MARK))
        return Mark(str(found["set"]), int(found["number"]), tuple(found["disks"]), bool(found["is_complete"]))
    except NotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{disk.url}/{MARK} can't be read", hint=_NEW_SET) from error


def judge(marks: Sequence[Mark | None], folders: Sequence[str]) -> bool:
    """Whether disks with these marks are one set; False when they are none yet.

    Raises `RefusedError` when some are, and names the first that does not fit.
    """
    known = next((mark for mark in marks if mark is not None and mark.is_complete), None)
    if known is None:
        return False
    for number, (mark, folder) in enumerate(zip(marks, folders, strict=True), 1):
        if mark is None:
            problem, hint = f"it has no {MARK}, as if another disk or none were mounted", f"mount it; {_NEW_SET}"
        elif mark.set != known.set:
            problem, hint = "it belongs to another store", "each disk belongs to one store: name its disks, all of them"
        elif (mark.number, len(mark.disks)) != (number, len(folders)):
            problem = f"it is disk {mark.number} of {len(mark.disks)}"
            hint = f"name the disks as they were, {','.join(mark.disks)}; {_NEW_SET}"
        else:
            continue
        raise RefusedError(f"{folder} is not disk {number} of {len(folders)} of this store: {problem}", hint=hint)
    return True


def is_set(disks: Sequence[LocalTier]) -> bool:
    """Whether disks are one set; False when they are none yet. Raises `RefusedError` when some don't belong to it."""
    folders = [disk.url for disk in disks]
    try:
        return judge(list(map(read_mark, disks)), folders)
    except RefusedError:
        # Some did not fit what another one said. A set that is made while we look has all its marks by then.
        return judge(list(map(read_mark, disks)), folders)


def make_set(disks: Sequence[LocalTier]) -> tuple[Mark, ...]:
    """Make disks one set unless they are; return their marks. Raises `RefusedError` when some don't belong to it."""
    if not is_set(disks):
        _make(disks)
    return tuple(mark for mark in map(read_mark, disks) if mark is not None)


def _make(disks: Sequence[LocalTier]) -> None:
    turn = Holds()
    try:
        disks[0].check_writable()  # makes the folder too
        try:
            turn.take("the store", disks[0].root / _LOCK, _PATIENCE_S)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise StoreError(f"can't lock {disks[0].root / _LOCK}: {error.strerror}") from error
        if not is_set(disks):
            _mark(disks)
    finally:
        turn.close()


def _mark(disks: Sequence[LocalTier]) -> None:
    name, folders = os.urandom(8).hex(), tuple(disk.url for disk in disks)
    marks = [Mark(name, number, folders, is_complete=False) for number in range(1, len(disks) + 1)]
    for is_complete in (False, True):
        for disk, mark in zip(disks, marks, strict=True):
            text = json.dumps(asdict(replace(mark, is_complete=is_complete)))
            disk.put(MARK, text.encode() + b"\n")


def refuse_alone(disk: LocalTier) -> None:
    """Raise `RefusedError` when a folder that is named alone is a disk of a set."""
    mark = read_mark(disk)
    if mark is not None and mark.is_complete:
        raise RefusedError(
            f"{disk.url} is disk {mark.number} of {len(mark.disks)} of a store, and holds only a part of it",
            hint=f"name all its disks, {','.join(mark.disks)}; {_NEW_SET}",
        )
