"""A booted systemd of its own, with the files of this machine: systemd-nspawn on an overlay of the root.

The overlay and what is written to it live in a mount namespace of the container, so that they are gone when it is,
however it ends; it ends with the process that started it. Only the folder that is bound outlives a reboot.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.waiting import PATIENCE_S, until

ROOT = Path(__file__).resolve().parents[2]
REBOOTED = 133
"""What systemd-nspawn ends with to be started again."""
_APART = "setpriv --pdeathsig KILL unshare --mount --propagation private --pid --fork --kill-child --mount-proc".split()
"""Starts a program with mounts and processes of its own, all of which end with whoever started it."""
_TRY = "mount -t tmpfs t /mnt && cd /mnt && mkdir a b c && mount -t overlay o -o lowerdir=/,upperdir=a,workdir=b c"
_BOOT = """
set -e
for group in $GROUPS_OF_ITS_OWN; do echo $$ > $group/cgroup.procs; done
mount -t tmpfs tmpfs "$TOP"
mkdir "$TOP/up" "$TOP/work" "$TOP/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$TOP/up,workdir=$TOP/work" "$TOP/root"
cd "$TOP/root"
rm -rf etc/systemd/system/* etc/machine-id
touch etc/machine-id
cp -a "$FILES/." .
for name in passwd group shadow; do cat "$FILES/../$name" >> etc/$name; done
for folder in $OPEN; do chmod o+x ".$folder"; done
exec systemd-nspawn --quiet --directory "$TOP/root" --boot --private-network --register=no --keep-unit \
    --console=pipe --machine "$NAME" "$@"
"""


def why_not() -> str:
    """Say why no container can be booted here; "" if one can."""
    if os.geteuid() != 0:
        return "systemd-nspawn needs root"
    for program in ("systemd-nspawn", "nsenter", "unshare", "setpriv"):
        if shutil.which(program) is None:
            return f"there is no {program}: apt-get install systemd-container util-linux"
    done = subprocess.run([*_APART, "sh", "-c", _TRY], capture_output=True, text=True, check=False)
    return f"no overlay of the root can be mounted: {done.stderr.strip()}" if done.returncode else ""


class Container:
    """A container that boots `files`, with `state` bound at a place of the same name and this project readable."""

    def __init__(self, folder: Path, state: Path) -> None:
        self._top = folder / "top"
        self._top.mkdir()
        self.files = folder / "files" / "root"
        """What is copied over the root before each boot."""
        self.files.mkdir(parents=True)
        self._state = state
        self._name = f"ckptd-{os.getpid()}"
        self._log = folder / "console.txt"
        self._groups = _groups(self._name)
        self._process: subprocess.Popen[bytes] | None = None
        self._leader = 0
        for name in ("passwd", "group", "shadow"):
            (self.files.parent / name).touch()

    def add_user(self, name: str, number: int, home: str) -> None:
        """Add an account; call it before `boot`."""
        (self.files.parent / "passwd").write_text(f"{name}:x:{number}:{number}::{home}:/bin/sh\n")
        (self.files.parent / "group").write_text(f"{name}:x:{number}:\n")
        (self.files.parent / "shadow").write_text(f"{name}:*:20000:0:99999:7:::\n")

    def boot(self) -> None:
        """Boot, and wait until systemd has started everything."""
        places = {ROOT, Path(sys.prefix), Path(sys.base_prefix)}
        bound = [place for place in places if not place.is_relative_to("/usr")]
        opened = sorted({str(parent) for place in bound for parent in place.parents if parent != Path("/")})
        for group in self._groups:
            group.mkdir(exist_ok=True)
        env = {
            **os.environ,
            "TOP": str(self._top),
            "FILES": str(self.files),
            "NAME": self._name,
            "OPEN": " ".join(opened),
            "GROUPS_OF_ITS_OWN": " ".join(map(str, self._groups)),
        }
        binds = [f"--bind-ro={place}" for place in bound] + [f"--bind={self._state}"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*_APART, "sh", "-c", _BOOT, "sh", *binds], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._leader = until(self._find_leader, "the first process of the container")
        until(self._is_up, "the end of the boot")

    def _find_leader(self) -> int:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text(errors="replace")[-3000:]
        for child in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name() == "systemd" and child.parent().name() == "systemd-nspawn":
                    return child.pid
        return 0

    def _is_up(self) -> bool:
        return self.run("systemctl", "is-system-running", check=False).strip() in ("running", "degraded")

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command in it as root; return what it printed."""
        done = subprocess.run(
            ["nsenter", "--target", str(self._leader), "--all", *command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"{command}: {done.returncode}: {done.stdout} {done.stderr}"
        return done.stdout

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a process of it, by the number that it has in there."""
        self.run("kill", f"-{number}", str(pid))

    def reboot(self) -> None:
        """Reboot, as `systemctl reboot` does."""
        assert self._process is not None
        self.run("systemctl", "reboot", check=False)
        assert self._process.wait(PATIENCE_S) == REBOOTED, self._log.read_text(errors="replace")[-3000:]
        self.boot()

    def lose_power(self) -> None:
        """End everything in it at once, then boot again: nothing in there is told, all memory is gone."""
        self._end()
        self.boot()

    def _end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(PATIENCE_S)
        self._process = None

    def close(self) -> None:
        """End it; nothing of it is left then, which is checked."""
        self._end()
        for group in self._groups:
            until(lambda group=group: _empty(group), f"the end of everything in {group}")
            _remove(group)
        assert str(self._top) not in Path("/proc/mounts").read_text()


def _groups(name: str) -> list[Path]:
    """Return cgroups of its own for the container, in each hierarchy that systemd uses.

    Empty ones of containers whose test was killed are removed, since nothing else does that.
    """
    groups = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        mounts = {"": ("unified", "."), "name=systemd": ("systemd",)}.get(controllers, ())
        for mount in mounts:
            folder = Path("/sys/fs/cgroup") / mount / path.lstrip("/")
            if (folder / "cgroup.procs").exists():
                groups.append(folder / name)
                for left in folder.glob("ckptd-*"):
                    if not psutil.pid_exists(int(left.name.partition("-")[2])) and _empty(left):
                        _remove(left)
                break
    return groups


def _remove(group: Path) -> None:
    for path in sorted(group.rglob("*/"), reverse=True):
        path.rmdir()
    group.rmdir()


def _empty(group: Path) -> bool:
    return not any((folder / "cgroup.procs").read_text() for folder in (group, *group.rglob("*/")))
