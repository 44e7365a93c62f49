"""The guest's root: an initramfs with a shell, this Python, and just those modules that `guest` takes."""

from __future__ import annotations

import json
import lzma
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

PROJECT = Path(__file__).resolve().parents[2]
_PATH = os.pathsep.join(("/usr/sbin", "/sbin", os.environ.get("PATH", os.defpath)))
_PYTHON = Path(sys.executable).resolve()
_MODULES = os.pathsep.join((str(PROJECT), str(Path(xxhash.__file__).parents[1])))
"""Where modules are found; without `site` none of the environment's others is loaded."""
_PYTHON_ARGUMENTS = (str(_PYTHON), "-S", "-B")
_REHEARSED_STEPS = 12
_DRIVERS = ("virtio_pci", "virtio_blk")
_INIT = f"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox stty -F /dev/ttyS1 raw -echo
for module in /modules/*; do /bin/busybox insmod $module || exit 1; done
/bin/busybox mount -t ext4 -o data=ordered,errors=panic /dev/vda /data || exit 1
cd /
export PYTHONPATH={_MODULES} LC_ALL=C.UTF-8
{" ".join(_PYTHON_ARGUMENTS)} -c "from tests.powercut import guest; raise SystemExit(guest.main())" || exit 1
/bin/busybox umount /data || exit 1
echo '{{"event": "off"}}' > /dev/ttyS1
/bin/busybox poweroff -f
"""
_FOLDER, _FILE, _DEVICE = 0o040755, 0o100755, 0o020600
_CONSOLE = (5, 1)


@dataclass(frozen=True, slots=True)
class Parts:
    """What Debian has to provide."""

    qemu: str
    busybox: str
    mke2fs: str
    e2fsck: str
    kernel: Path


class MissingError(Exception):
    """Something is not installed."""


def parts() -> Parts:
    """Return where everything is; raises `MissingError` that says which packages lack."""
    found = {name: shutil.which(name, path=_PATH) for name in ("qemu-system-x86_64", "busybox", "mke2fs", "e2fsck")}
    packages = {"qemu-system-x86_64": "qemu-system-x86", "busybox": "busybox-static"}
    missing = sorted({packages.get(name, "e2fsprogs") for name, path in found.items() if path is None})
    kernels = sorted(Path("/boot").glob("vmlinuz-*-cloud-amd64"))
    if not kernels:
        missing.append("linux-image-cloud-amd64")
    if missing:
        raise MissingError(f"missing: apt-get install --no-install-recommends {' '.join(missing)}")
    qemu, busybox, mke2fs, e2fsck = map(str, found.values())
    return Parts(qemu, busybox, mke2fs, e2fsck, kernels[-1])


def build(parts: Parts, to: Path) -> None:
    """Write the initramfs; raises `subprocess.CalledProcessError` when what is to run there does not even run here."""
    busybox = Path(parts.busybox)
    files: dict[str, tuple[int, bytes]] = {
        "init": (_FILE, _INIT.encode()),
        "bin/busybox": (_FILE, busybox.read_bytes()),
        str(_PYTHON): (_FILE, _PYTHON.read_bytes()),
    }
    for number, (name, data) in enumerate(_drivers(parts.kernel)):
        files[f"modules/{number}-{name}"] = (_FILE, data)
    needs_libraries = [busybox, _PYTHON]
    for module in _modules():
        files[str(module)] = (_FILE, module.read_bytes())
        if module.suffix == ".py":
            files[str(module.parent / "__pycache__" / f"{module.stem}.{sys.implementation.cache_tag}.pyc")] = (
                _FILE,
                _compiled(module),
            )
        else:
            needs_libraries.append(module)
    for binary in needs_libraries:
        for library in _libraries(binary):
            files[str(library)] = (_FILE, library.read_bytes())
    to.write_bytes(_archive(files))


def _drivers(kernel: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the kernel's modules that the guest's disk takes, in an order in which they can be loaded."""
    folder = Path("/lib/modules") / kernel.name.removeprefix("vmlinuz-")
    needs: dict[str, list[str]] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        file, _, needed = line.partition(":")
        needs[file] = needed.split()
    in_order: dict[str, None] = {}
    for driver in _DRIVERS:
        file = next(file for file in needs if Path(file).name.partition(".")[0] == driver)
        in_order.update(dict.fromkeys([*reversed(needs[file]), file]))
    for file in in_order:
        data = (folder / file).read_bytes()
        yield Path(file).name.removesuffix(".xz"), lzma.decompress(data) if file.endswith(".xz") else data


def _modules() -> list[Path]:
    """Return the files of all modules that are loaded once everything was done."""
    program = (
        f"from pathlib import Path; from tests.powercut import guest; guest.rehearse(Path('.'), {_REHEARSED_STEPS})"
    )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*_PYTHON_ARGUMENTS, "-c", program],
            cwd=folder,
            env={"PYTHONPATH": _MODULES, "LC_ALL": "C.UTF-8"},
            stdout=subprocess.PIPE,
            check=True,
        )
    return [Path(file) for file in json.loads(done.stdout)]


def _compiled(module: Path) -> bytes:
    """Return a module's bytecode, which is valid whatever times its source has: compiling takes long in a guest."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "module.pyc"
        py_compile.compile(
            str(module), str(to), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )
        return to.read_bytes()


def _libraries(binary: Path) -> list[Path]:
    done = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=False)
    words = [line.split() for line in done.stdout.splitlines()]
    return [Path(word) for line in words for word in line if word.startswith("/")]


def _archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """Return an archive as the kernel unpacks it (cpio, "newc"), with the folders that files need."""
    entries: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    for name in ("proc", "sys", "dev", "data", "tmp"):
        entries[name] = (_FOLDER, b"", (0, 0))
    entries["dev/console"] = (_DEVICE, b"", _CONSOLE)
    for name, (mode, data) in files.items():
        path = Path(name.lstrip("/"))
        for parent in reversed(path.parents[:-1]):
            entries.setdefault(str(parent), (_FOLDER, b"", (0, 0)))
        entries[str(path)] = (mode, data, (0, 0))
    entries["TRAILER!!!"] = (0, b"", (0, 0))
    archive = bytearray()
    for number, (name, (mode, data, device)) in enumerate(entries.items(), 1):
        encoded = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
