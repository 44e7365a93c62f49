"""How much memory slots may take: the machine's, every cgroup's above us, and what the operator allows."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptd.daemon.arena import Arena, Budget, available_bytes
from ckptd.errors import MemoryBudgetError

GIB = 2**30
MIB = 2**20


class Kernel:
    """The kernel's files below a folder of the test's own."""

    def __init__(self, root: Path, available_bytes: int = 64 * GIB) -> None:
        self.root = root
        self.write(
            "proc/meminfo", f"MemTotal: 99999999 kB\nMemAvailable:   {available_bytes // 1024} kB\nBuffers: 1 kB\n"
        )
        self.write("proc/self/cgroup", "")

    def write(self, place: str, text: object) -> None:
        """Write one of its files."""
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n" if text != "" else "")

    def group(self, folder: str, limit: object, usage: int, *, version: int = 2, cache: int = 0) -> None:
        """Make a cgroup with a limit; half of its page cache is active."""
        place = f"sys/fs/cgroup/{folder}"
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        total = "" if version == 2 else "total_"
        self.write(f"{place}/{names[0]}", limit)
        self.write(f"{place}/{names[1]}", usage)
        self.write(
            f"{place}/memory.stat",
            f"anon 5\n{total}active_file {cache // 2}\n{total}inactive_file {cache - cache // 2}",
        )


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """A machine with 64 GiB available and no cgroup."""
    return Kernel(tmp_path)


def test_the_machine_itself_is_a_limit(kernel: Kernel) -> None:
    """Without a cgroup, what the kernel calls available counts."""
    assert available_bytes(kernel.root) == 64 * GIB


def test_a_machine_that_says_nothing_has_nothing(kernel: Kernel) -> None:
    """A kernel without MemAvailable promises no memory."""
    kernel.write("proc/meminfo", "MemTotal: 12 kB")
    assert available_bytes(kernel.root) == 0


@pytest.mark.parametrize("mount", ["", "unified/"])
def test_cgroup_v2(kernel: Kernel, mount: str) -> None:
    """The tightest limit between our group and the root counts, in the unified hierarchy wherever it is mounted."""
    kernel.write("proc/self/cgroup", "0::/pod/container")
    kernel.group(f"{mount}pod/container", "max", 9 * GIB)
    assert available_bytes(kernel.root) == 64 * GIB
    kernel.group(f"{mount}pod", 20 * GIB, 12 * GIB)
    assert available_bytes(kernel.root) == 8 * GIB
    kernel.group(f"{mount}pod/container", 10 * GIB, 9 * GIB)
    assert available_bytes(kernel.root) == 1 * GIB


def test_cgroup_v1(kernel: Kernel) -> None:
    """The memory controller of version 1 counts, mounted with others or alone; unlimited there is a huge number."""
    kernel.write("proc/self/cgroup", "7:cpu,cpuacct:/pod\n4:memory:/pod\n1:name=systemd:/pod")
    kernel.group("memory/pod", 2**63 - 4096, 3 * GIB, version=1)
    assert available_bytes(kernel.root) == 64 * GIB
    kernel.group("memory", 5 * GIB, 3 * GIB, version=1)
    assert available_bytes(kernel.root) == 2 * GIB


def test_hybrid_cgroups(kernel: Kernel) -> None:
    """With both hierarchies mounted, the limits of both count."""
    kernel.write("proc/self/cgroup", "4:memory:/a\n0::/b")
    kernel.group("memory/a", 8 * GIB, 1 * GIB, version=1)
    kernel.group("unified/b", 8 * GIB, 2 * GIB)
    assert available_bytes(kernel.root) == 6 * GIB
    kernel.group("memory/a", 8 * GIB, 5 * GIB, version=1)
    assert available_bytes(kernel.root) == 3 * GIB


def test_a_container_that_sees_only_its_own_group(kernel: Kernel) -> None:
    """A path that isn't mounted in this container falls back to the mount's root, which is the container's group."""
    kernel.write("proc/self/cgroup", "4:memory:/docker/0123\n0::/../../docker/0123")
    kernel.group("memory", 4 * GIB, 1 * GIB, version=1)
    assert available_bytes(kernel.root) == 3 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_page_cache_is_free_memory(kernel: Kernel, version: int) -> None:
    """A training that has read its data until its cgroup is full of page cache still gets its slots."""
    kernel.write("proc/self/cgroup", "4:memory:/a" if version == 1 else "0::/a")
    kernel.group("memory/a" if version == 1 else "a", 8 * GIB, 8 * GIB, version=version, cache=5 * GIB)
    assert available_bytes(kernel.root) == 5 * GIB


def test_more_used_than_allowed_is_nothing_left(kernel: Kernel) -> None:
    """A group above its limit, as after a limit was lowered, has nothing left rather than less than nothing."""
    kernel.write("proc/self/cgroup", "0::/a")
    kernel.group("a", 2 * GIB, 3 * GIB)
    assert available_bytes(kernel.root) == 0


def test_a_margin_stays_free(kernel: Kernel) -> None:
    """The last 256 MiB are never given to slots, and the refusal names the bytes, what is there, and a way out."""
    Kernel(kernel.root, 1 * GIB)
    Budget(root=kernel.root).take(1 * GIB - 256 * MIB, "2 slots")
    with pytest.raises(MemoryBudgetError) as refused:
        Budget(root=kernel.root).take(1 * GIB - 256 * MIB + 1, "2 slots of rank 3")
    assert refused.value.message == (
        f"not enough memory for slots: 2 slots of rank 3 need 768.0 MiB ({1 * GIB - 256 * MIB + 1} bytes),"
        " 1.0 GiB are available and 256.0 MiB of them stay free"
    )
    assert refused.value.hint == "free some memory"


@pytest.mark.parametrize("limit", ["machine", "memory_max"])
def test_a_refusal_says_how_to_need_less(kernel: Kernel, limit: str) -> None:
    """The hint has the number of slots that a rank really has, and `--slots 1` where that would help."""
    Kernel(kernel.root, 300 * MIB)
    way_out = "free some memory" if limit == "machine" else "raise CKPTD_MEMORY_MAX"
    for slots, said in (
        (1, " or use a smaller model: each rank needs a slot of its state's size"),
        (3, ", or use `--slots 1`: each rank has 3 slots of its state's size, and with one there is no snapshot"),
    ):
        arena = Arena("job", Budget(MIB if limit == "memory_max" else 0, kernel.root), slots)
        with pytest.raises(MemoryBudgetError, match=f"{slots} slots? of rank 7 of job job need") as refused:
            arena.reserve(7, 60 * MIB, ())
        assert str(refused.value.hint).startswith(way_out + said)


def test_memory_max_holds_over_all_jobs(kernel: Kernel) -> None:
    """`memory_max` bounds the sum of all slots; the refusal names the bytes and what is left of it."""
    budget = Budget(100 * MIB, kernel.root)
    budget.take(70 * MIB, "a")
    with pytest.raises(MemoryBudgetError, match=r"need 31\.0 MiB \(32505856 bytes\), 30\.0 MiB of memory_max are left"):
        budget.take(31 * MIB, "b")
    budget.take(30 * MIB, "c")
    budget.give(70 * MIB)
    assert budget.used_bytes == 30 * MIB


def test_ranks_that_ask_together_are_not_promised_the_same_memory(kernel: Kernel) -> None:
    """Of many that ask at once for memory that the kernel still shows as free, only as many succeed as fit."""
    Kernel(kernel.root, 4 * GIB)
    budget = Budget(root=kernel.root)
    together = threading.Barrier(8)

    def ask() -> bool:
        together.wait()
        try:
            budget.take(1 * GIB, "slots")
        except MemoryBudgetError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask) for _ in range(8)]
    assert sum(answer.result() for answer in answers) == 3
    assert budget.used_bytes == 3 * GIB


def test_memory_is_not_counted_twice_while_it_is_reserved(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one rank has reserved already is not held against another that asks while the first goes on."""
    Kernel(kernel.root, 2 * GIB)
    budget = Budget(root=kernel.root)
    arena = Arena("job", budget, 1)
    asked: list[BaseException | None] = []
    kernel_bytes = 2 * GIB

    def reserve(_: int, __: int, at: int, size: int) -> None:
        nonlocal kernel_bytes
        kernel_bytes -= size  # a stand-in: the test should not need the memory that it talks of
        Kernel(kernel.root, kernel_bytes)
        if at == 512 * MIB:  # nine pieces of 64 MiB are there, of the 1056 MiB that the first one gets
            with ThreadPoolExecutor(1) as other:
                asked.append(other.submit(budget.take, 600 * MIB, "the other's slots").exception())

    monkeypatch.setattr("ckptd.daemon.region._reserve", reserve)
    arena.reserve(0, 1 * GIB, ())
    arena.close()
    assert asked == [None]


def test_the_real_machine_has_memory() -> None:
    """On this machine the figure is positive, and not above what the kernel calls available."""
    meminfo = Path("/proc/meminfo").read_text()
    machine = re.search(r"MemAvailable:\s+(\d+)", meminfo)
    assert machine is not None
    assert 0 < available_bytes() <= int(machine[1]) * 1024 + GIB
