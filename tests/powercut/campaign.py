"""Power cuts, one after the other, on one disk: boot, look, work, lose power."""

from __future__ import annotations

import contextlib
import mmap
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.powercut import moments, root
from tests.powercut.disk import Disk
from tests.powercut.judge import Judge
from tests.powercut.machine import Ended, Machine, PowerGone
from tests.powercut.moments import Moment, Trigger

_DISK_BYTES = 128 * 2**20
_SILENCE_S = 180.0
"""A guest that says nothing for so long hangs; on a busy machine a boot may take a minute."""
_CONSOLE_LINES = 30
_MOST_COMMITS = 12
"""After so many in one boot the power goes, whatever moment was drawn: some phases are rare."""


class ViolationError(Exception):
    """A promise was broken, or the guest can't go on."""


class Campaign:
    """One disk and what is known to be on it."""

    def __init__(self, folder: Path, seed: int, sabotage: str | None) -> None:
        """Make the guest's root and an empty disk in `folder`; raises `MissingError` when that can't be."""
        self.cuts = Counter[str]()
        """By what the guest was at."""
        self.cut_writes = Counter[str]()
        """By what became of them."""
        self.commits = 0
        """So many were acknowledged."""
        self.looks = 0
        """So many checkpoints were found after a boot, and were whole."""
        self._parts = root.parts()
        self._folder = folder
        self._rng = random.Random(seed)
        self._settings = {"ckptd_seed": str(seed)} | ({"ckptd_sabotage": sabotage} if sabotage else {})
        self._judge = Judge()
        self._phase = "boot"
        self._found = "nothing, since it was cut off before"
        root.build(self._parts, folder / "root.cpio")
        self._image = folder / "disk.img"
        with self._image.open("wb") as image:
            image.truncate(_DISK_BYTES)
        options = ["-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"]
        subprocess.run(
            [self._parts.mke2fs, "-q", "-F", "-t", "ext4", "-b", "4096", *options, str(self._image)], check=True
        )

    def run(self, kills: int) -> Iterator[str]:
        """Cut power so many times, then boot once more and end in peace; yields a line for each boot.

        Raises `ViolationError` at the first broken promise.
        """
        with self._image.open("r+b") as image, contextlib.closing(mmap.mmap(image.fileno(), 0)) as durable:
            with contextlib.closing(mmap.mmap(-1, len(durable))) as seen:
                disk = Disk(durable, seen)
                for number in range(1, kills + 1):
                    yield f"{number:3}  {self._boot(disk, moments.draw(self._rng))}"
                yield f"end  {self._boot(disk, None)}"
        check = subprocess.run([self._parts.e2fsck, "-f", "-n", str(self._image)], capture_output=True, text=True)
        if check.returncode != 0:
            raise ViolationError(
                f"the filesystem itself is damaged, which a legal disk can't do to it:\n{check.stdout}"
            )

    def _boot(self, disk: Disk, moment: Moment | None) -> str:
        """Boot, and go on until the moment comes; without one, look and shut down."""
        self._phase, self._found = "boot", "nothing, since it was cut off before"
        begin_s = time.monotonic()
        machine = Machine(self._parts, self._folder, disk, self._settings | ({} if moment else {"ckptd_last": "1"}))
        try:
            self._follow(machine, moment)
        finally:
            last_words = list(machine.cut_power())
        for event in last_words:
            self._hear(event)
        cut = disk.cut(self._rng)
        if moment is not None:
            self.cuts[self._phase] += 1
            self.cut_writes.update(kept=cut.kept, torn=cut.torn, lost=cut.lost)
        return (
            f"{time.monotonic() - begin_s:5.1f} s  found {self._found}; "
            + ("shut down" if moment is None else f"cut at {self._phase} ({moment})")
            + f"; of {cut.writes} cached writes {cut.kept} kept, {cut.torn} torn, {cut.lost} lost"
        )

    def _follow(self, machine: Machine, moment: Moment | None) -> None:
        """Listen to the guest until the power has to go, or is gone."""
        cut_at_s: float | None = None
        times, last_commit = Counter[str](boot=1), self.commits + _MOST_COMMITS
        if moment is not None and moment.phase == "boot":
            cut_at_s = _arm(machine, moment)
        while True:
            heard = machine.hear(_SILENCE_S if cut_at_s is None else cut_at_s - time.monotonic())
            if isinstance(heard, PowerGone) or (heard is None and cut_at_s is not None):
                return
            if heard is None:
                raise ViolationError(f"the guest says nothing for {_SILENCE_S:g} s\n{_tail(machine)}")
            if isinstance(heard, Ended):
                raise ViolationError(f"the guest has ended, at {self._phase}\n{_tail(machine)}")
            self._hear(heard)
            if heard["event"] == "off" or self.commits >= last_commit:
                return
            if heard["event"] == "phase" and moment is not None:
                times[self._phase] += 1
                if moment.phase == self._phase and moment.times == times[self._phase]:
                    cut_at_s = _arm(machine, moment)

    def _hear(self, said: Mapping[str, Any]) -> None:
        match said["event"]:
            case "phase":
                self._phase = said["name"]
            case "may":
                self._judge.may(said["register"], said["value"])
            case "did":
                self._judge.did(said["register"], said["value"])
                self.commits += said["register"].startswith("checkpoint") and said["value"] is not None
            case "found":
                self._found = f"{said['checkpoints']} checkpoints, the newest {said['newest']}"
                self.looks += said["checkpoints"]
                if wrong := self._judge.found(said["registers"]):
                    raise ViolationError("\n".join(wrong))
            case "problem":
                raise ViolationError(said["text"])


def _arm(machine: Machine, moment: Moment) -> float | None:
    """Have the power go at the moment's request; without one, return when it has to be cut."""
    if moment.trigger is Trigger.TIME:
        return time.monotonic() + moment.amount
    machine.cut_power_at(int(moment.amount), only_flushes=moment.trigger is Trigger.FLUSH)
    return None


def _tail(machine: Machine) -> str:
    """Return the end of what the guest said; of a panic what led to it, and not where the kernel was then."""
    said = machine.console.read_text(errors="replace").splitlines()
    end = next((place + 1 for place, line in enumerate(said) if "Kernel panic" in line), len(said))
    return "\n".join(said[max(0, end - _CONSOLE_LINES) : end])
