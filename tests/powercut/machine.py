"""The guest's machine: QEMU by software alone, its disk behind our NBD server, its power in our hand."""

from __future__ import annotations

import contextlib
import ctypes
import json
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.powercut import nbd
from tests.powercut.disk import Disk
from tests.powercut.root import Parts

_PR_SET_PDEATHSIG = 1
_KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr cryptomgr.notests no_timer_check"
_START_S = 60.0
_libc = ctypes.CDLL(None, use_errno=True)


class StartError(Exception):
    """QEMU can't be started."""


@dataclass(frozen=True, slots=True)
class PowerGone:
    """The disk came to the request at which the power was to go; it answers no more."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The guest has ended."""


Heard = Mapping[str, Any] | PowerGone | Ended


class Machine:
    """One boot of the guest. `disk` has to be left alone until `cut_power` has returned."""

    def __init__(self, parts: Parts, folder: Path, disk: Disk, settings: Mapping[str, str]) -> None:
        """Start it; what it says on its console is kept in `folder`."""
        self.console = folder / "console.log"
        self._heard: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._counted: tuple[nbd.Kind, ...] = ()
        self._requests_left = 0
        self._has_power = True
        address, log = folder / "disk.sock", folder / "qemu.log"
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener, log.open("wb") as errors:
            listener.bind(str(address))
            listener.listen(1)
            listener.settimeout(_START_S)
            self._qemu = subprocess.Popen(
                _command(parts, folder, address, self.console, settings),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                preexec_fn=_die_with_us,
            )
            try:
                connection, _ = listener.accept()
            except TimeoutError as error:
                self._end()
                raise StartError(f"QEMU does not come to its disk within {_START_S:g} s: {log.read_text()}") from error
            except BaseException:
                self._end()
                raise
            finally:
                address.unlink()
        self._threads = [
            threading.Thread(target=self._serve, args=(connection, disk)),
            threading.Thread(target=self._listen),
        ]
        for thread in self._threads:
            thread.start()

    def hear(self, deadline_s: float) -> Heard | None:
        """Return what comes next within a time, None when nothing does."""
        with contextlib.suppress(queue.Empty):
            return self._heard.get(timeout=max(deadline_s, 0))
        return None

    def cut_power_at(self, request: int, *, only_flushes: bool) -> None:
        """Have the power go before a write or flush is carried out; they are counted from now on, from 1."""
        with self._lock:
            self._requests_left = request
            self._counted = (nbd.Kind.FLUSH,) if only_flushes else (nbd.Kind.WRITE, nbd.Kind.FLUSH)

    def cut_power(self) -> Iterator[Mapping[str, Any]]:
        """Take the power away now, if it isn't gone, and yield what the guest had said until then."""
        with self._lock:
            self._has_power = False
        self._end()
        for thread in self._threads:
            thread.join()
        while (heard := self.hear(0)) is not None:
            if isinstance(heard, Mapping):
                yield heard

    def _end(self) -> None:
        self._qemu.kill()
        self._qemu.wait()

    def _serve(self, connection: socket.socket, disk: Disk) -> None:
        with connection:
            nbd.serve(connection, disk, self._is_powered)
            with self._lock:
                is_cut = not self._has_power
            if is_cut:
                self._heard.put(PowerGone())
                self._qemu.wait()  # the connection stays open: the guest must not see an error instead

    def _is_powered(self, kind: nbd.Kind) -> bool:
        with self._lock:
            if kind in self._counted:
                self._requests_left -= 1
                self._has_power = self._has_power and self._requests_left > 0
            return self._has_power

    def _listen(self) -> None:
        assert self._qemu.stdout is not None
        with self._qemu.stdout as port:
            for line in port:
                if line.endswith(b"\n"):  # the power may have gone in the middle of one
                    self._heard.put(json.loads(line))
        self._heard.put(Ended())


def _command(parts: Parts, folder: Path, address: Path, console: Path, settings: Mapping[str, str]) -> list[str]:
    arguments = " ".join([_KERNEL_ARGUMENTS, *(f"{name}={value}" for name, value in settings.items())])
    return [
        parts.qemu,
        *("-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "512"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(parts.kernel), "-initrd", str(folder / "root.cpio"), "-append", arguments),
        *("-serial", f"file:{console}", "-serial", "stdio"),
        # The guest sees a disk with a volatile cache; its flushes come to us. QEMU's NVMe would not do: it drops FUA.
        *("-drive", f"if=none,id=data,format=raw,cache=writeback,file=nbd+unix:///?socket={address}"),
        *("-device", "virtio-blk-pci,drive=data,discard=off,write-zeroes=off"),
    ]


def _die_with_us() -> None:
    """Leave no machine behind, however this process ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
