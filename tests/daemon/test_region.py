"""Memory that is there before it is lent: with huge pages where the machine gives them, refused where it is short."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.daemon import region
from ckptd.errors import MemoryBudgetError
from tests.daemon.harness import mapped_regions, open_descriptors

MIB = 2**20


def resident_bytes(address_part: str) -> tuple[int, int]:
    """How much of the regions of that name is mapped here, in all and in huge pages."""
    found, resident, huge = False, 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            found = address_part in line
        elif found and (match := re.match(r"(Rss|ShmemPmdMapped):\s+(\d+) kB", line)):
            resident += 1024 * int(match[2]) * (match[1] == "Rss")
            huge += 1024 * int(match[2]) * (match[1] == "ShmemPmdMapped")
    return resident, huge


def huge_pages_allowed(tmp_path: Path) -> bool:
    """Whether this process may open a tmpfs of its own, which is what a huge region needs at least."""
    try:
        os.close(region._open_huge("probe"))
    except OSError:
        return False
    return True


@pytest.fixture
def no_own_filesystem(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without the right to open a filesystem."""

    def refuse(name: str) -> int:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(region, "_open_huge", refuse)


def check(name: str, size: int) -> None:
    """A region of that size is there whole, zeroed, lendable and gone when it is closed."""
    before = open_descriptors(), mapped_regions()
    settled: list[int] = []
    descriptor, mapped = region.make(name, size, settled.append)
    try:
        assert sum(settled) == size
        assert max(settled) <= region.PIECE_BYTES
        stat = os.fstat(descriptor)
        assert stat.st_size == len(mapped) == size
        assert stat.st_blocks * 512 >= size
        assert resident_bytes(name)[0] == size
        assert not os.get_inheritable(descriptor)
        assert mapped[:] == bytes(size)
        lent = mmap.mmap(os.dup(descriptor), size, mmap.MAP_SHARED)
        lent[-4:] = b"lent"
        assert mapped[-4:] == b"lent"
        lent.close()
    finally:
        mapped.close()
        os.close(descriptor)
    assert open_descriptors() <= before[0] + 1  # the duplicate that the map keeps is closed with it
    assert mapped_regions() == before[1]


@pytest.mark.parametrize("size", [4096, MIB, 2 * MIB, 66 * MIB])
def test_every_page_is_there(size: int) -> None:
    """Every page is resident in the agent's own mapping, whatever the size; others can map the same memory."""
    check(f"ckptd-test-{size}", size)


@pytest.mark.parametrize("size", [4096, 66 * MIB])
def test_every_page_is_there_without_huge_pages(no_own_filesystem: None, size: int) -> None:
    """The same without the right to a filesystem of one's own."""
    check(f"ckptd-plain-{size}", size)


def test_a_kernel_that_can_not_populate(monkeypatch: pytest.MonkeyPatch, no_own_filesystem: None) -> None:
    """Before Linux 5.14 pages are reserved by `posix_fallocate`."""
    monkeypatch.setattr(region, "_MADV_POPULATE_WRITE", 9999)  # which every kernel answers as an old one does
    descriptor, mapped = region.make("ckptd-old", 3 * MIB)
    assert os.fstat(descriptor).st_blocks * 512 >= 3 * MIB
    mapped.close()
    os.close(descriptor)


def test_huge_pages_where_they_are_allowed(tmp_path: Path) -> None:
    """With the right to it a region consists of huge pages, in the agent's mapping and in the rank's."""
    if not huge_pages_allowed(tmp_path):
        pytest.skip("this process may not open a tmpfs of its own")
    if "[deny]" in Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text():
        pytest.skip("huge pages are denied on this machine")
    descriptor, mapped = region.make("ckptd-huge", 8 * MIB)
    lent = mmap.mmap(descriptor, 8 * MIB, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    try:
        huge = resident_bytes("ckptd-huge")[1]
        assert huge % region.HUGE_BYTES == 0
        if huge == 0:
            pytest.skip("the kernel has no huge page free")
        assert huge == 16 * MIB
    finally:
        lent.close()
        mapped.close()
        os.close(descriptor)


def test_no_mount_is_left(tmp_path: Path) -> None:
    """The filesystem of a region is in nobody's mount table, not even while the region exists."""
    before = Path("/proc/self/mountinfo").read_text()
    descriptor, mapped = region.make("ckptd-hidden", 2 * MIB)
    assert Path("/proc/self/mountinfo").read_text() == before
    assert os.readlink(f"/proc/self/fd/{descriptor}") == "/memfd:ckptd-hidden (deleted)"
    mapped.close()
    os.close(descriptor)


_SHORT = """
import json, os, sys
from ckptd.daemon import region
from ckptd.errors import MemoryBudgetError
place = sys.argv[1]
region._open = lambda *_: os.open(place + "/slot", os.O_RDWR | os.O_CREAT)
before = len(os.listdir("/proc/self/fd"))
settled = []
try:
    region.make("ckptd-short", 64 * 2**20, settled.append)
except MemoryBudgetError as error:
    print(json.dumps([error.message, settled, len(os.listdir("/proc/self/fd")) - before]))
"""


def test_too_little_memory_is_a_refusal(tmp_path: Path) -> None:
    """Where memory really runs out the kernel's answer is an error, where a plain write would be SIGBUS."""
    enter = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    script = 'mount -t tmpfs -o size=40m none "$1" || exit 77; exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        [*enter, "sh", "-c", script, "sh", str(tmp_path), sys.executable, _SHORT],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode in (1, 77):
        pytest.skip(f"no filesystem can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    message, settled, leaked = json.loads(done.stdout)
    assert re.search(r"the kernel refused 64\.0 MiB \(67108864 bytes\): (Cannot allocate memory|No space)", message)
    assert settled == []
    assert leaked == 0


def test_an_error_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a refusal no descriptor and no map is left, even while the error is kept."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(region, "_reserve", refuse)
    before = open_descriptors(), mapped_regions()
    with pytest.raises(MemoryBudgetError) as caught:
        region.make("ckptd-refused", 4 * MIB)
    assert (open_descriptors(), mapped_regions()) == before, caught.value
