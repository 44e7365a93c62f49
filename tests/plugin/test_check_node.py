"""The checks that ship: they keep the contract, and find what is wrong with disks, memory, ports and GPUs."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ckptd.plugin import NodeCheck, NodePlan
from ckptd.testing import NodeCheckSuite
from ckptd_plugins.check_gpu import DriverError, Gpu, GpuCheck, NvmlDriver, chosen, unsound
from ckptd_plugins.check_node import DiskCheck, MemoryCheck, PortCheck


class TestDiskCheck(NodeCheckSuite):
    """The check of the disk keeps the contract."""

    @pytest.fixture
    def check(self) -> NodeCheck:
        """The check of the disk."""
        return DiskCheck()


class TestMemoryCheck(NodeCheckSuite):
    """The check of memory keeps the contract."""

    @pytest.fixture
    def check(self) -> NodeCheck:
        """The check of memory."""
        return MemoryCheck()


class TestPortCheck(NodeCheckSuite):
    """The check of ports keeps the contract."""

    @pytest.fixture
    def check(self) -> NodeCheck:
        """The check of ports."""
        return PortCheck()


class TestGpuCheck(NodeCheckSuite):
    """The check of GPUs keeps the contract, with the real library and whatever driver is here."""

    @pytest.fixture
    def check(self) -> NodeCheck:
        """The check of GPUs."""
        return GpuCheck(NvmlDriver())


def plan(*folders: Path, restarts: bool = False, ranks: int = 2, **env: str) -> NodePlan:
    """Return a plan of a job that writes there."""
    return NodePlan("job", ranks, tuple(map(str, folders)), env, restarts=restarts)


# --- the disk ---------------------------------------------------------------------------------------------------


def test_a_disk_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    """The probe leaves nothing behind, also where the tier's folder is still to be made."""
    assert DiskCheck().check(plan(tmp_path)) is None
    assert DiskCheck().check(plan(tmp_path / "not" / "yet")) is None
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one MiB, to be filled or made read-only."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_read_only_disk_is_unfit(small_disk: Path) -> None:
    """A file system that the kernel has made read-only, as after errors, is said by its path."""
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    said = f"{small_disk} can't be written: {os.strerror(errno.EROFS)}"
    assert DiskCheck().check(plan(small_disk / "runs")) == said
    assert DiskCheck().check(plan(small_disk / "runs", restarts=True)) == said


def test_a_full_disk_stops_a_first_start_only(small_disk: Path) -> None:
    """A job that has run makes room on a full disk by itself, so only one that has not must wait for it."""
    filler = os.open(small_disk / "filler", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="No space"):
        while True:
            os.write(filler, bytes(4096))
    os.close(filler)
    assert DiskCheck().check(plan(small_disk)) == f"{small_disk} can't be written: {os.strerror(errno.ENOSPC)}"
    assert DiskCheck().check(plan(small_disk, restarts=True)) is None


def test_of_several_disks_the_first_counts(small_disk: Path, tmp_path: Path) -> None:
    """A further disk that fails is passed over by the job, so it holds up no start."""
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert DiskCheck().check(plan(tmp_path, small_disk)) is None
    assert DiskCheck().check(plan(small_disk, tmp_path)) is not None


# --- memory and ports -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needs", "left", "says"),
    [
        (0, 0, None),
        (0, -5, None),  # a restart on a node that is short of memory: its slots are there already
        (100, 100, None),
        (2 * 2**30, 2**30, "the job's slots need 2.0 GiB more, 1.0 GiB can be reserved"),
        (2**30, -5, "the job's slots need 1.0 GiB more, 0 B can be reserved"),
    ],
)
def test_memory_for_the_slots(needs: int, left: int, says: str | None) -> None:
    """What the job had must fit into what can be reserved."""
    wanted = NodePlan("job", 1, (), {}, memory_bytes=needs, memory_left_bytes=left)
    assert MemoryCheck().check(wanted) == says


# --- GPUs -------------------------------------------------------------------------------------------------------

SOUND = Gpu(0, "GPU-aa", uncorrected=0, mending=False, worn_out=False)


@pytest.mark.parametrize(
    ("gpu", "says"),
    [
        (SOUND, None),
        (Gpu(0, "GPU-aa"), None),
        (Gpu(2, gone="has fallen off the bus"), "GPU 2 has fallen off the bus"),
        (Gpu(2, "GPU-aa", uncorrected=4, mending=False, worn_out=False), None),
        (Gpu(2, "GPU-aa", uncorrected=4), "GPU 2 has had 4 memory errors that ECC could not correct"),
        (Gpu(2, "GPU-aa", None, 4, True, False), "GPU 2 has memory errors and needs a reset (nvidia-smi --gpu-reset)"),
        (Gpu(2, "GPU-aa", None, 4, True), "GPU 2 has memory errors and needs a reset (nvidia-smi --gpu-reset)"),
        (
            Gpu(2, "GPU-aa", None, 4, False, True),
            "GPU 2 has memory errors and no spare rows left: it should be replaced",
        ),
    ],
)
def test_what_is_wrong_with_a_gpu(gpu: Gpu, says: str | None) -> None:
    """Lost, worn out, waiting for a reset, or with errors that nothing has dealt with: each is told apart."""
    assert unsound(gpu) == says


EIGHT = [Gpu(number, f"GPU-{number:02x}ff", uncorrected=0, mending=False, worn_out=False) for number in range(8)]


@pytest.mark.parametrize(
    ("visible", "ranks", "found", "missing"),
    [
        (None, 2, [0, 1], []),
        (None, 16, list(range(8)), []),
        ("3,5", 2, [3, 5], []),
        (" 3 , 9", 2, [3], ["9"]),
        ("GPU-04ff,GPU-06", 2, [4, 6], []),
        ("GPU-zz", 1, [], ["GPU-zz"]),
        ("MIG-1b2c", 1, [], []),
        ("-1", 1, [], []),
        ("", 1, [], []),
    ],
)
def test_which_gpus_a_job_will_use(visible: str | None, ranks: int, found: list[int], missing: list[str]) -> None:
    """By number, by name or one a rank: a GPU that the job does not see can't keep it from starting."""
    gpus, lacking = chosen(visible, ranks, EIGHT)
    assert ([gpu.index for gpu in gpus], lacking) == (found, missing)


class FakeDriver:
    """Stands in for a GPU driver, of which there is none on a machine without GPUs. Everything above it is real."""

    def __init__(self, answer: Sequence[Gpu] | DriverError | None) -> None:
        self.answer = answer

    def gpus(self) -> Sequence[Gpu] | None:
        """Return what it was given."""
        if isinstance(self.answer, DriverError):
            raise self.answer
        return self.answer


def test_a_lost_gpu_is_unfit_for_the_job_that_uses_it() -> None:
    """A GPU off the bus stops the job that would run on it, and no other."""
    gpus = [EIGHT[0], Gpu(1, gone="has fallen off the bus"), *EIGHT[2:]]
    check = GpuCheck(FakeDriver(gpus))
    assert check.check(plan(ranks=2)) == "GPU 1 has fallen off the bus"
    assert check.check(plan(ranks=1)) is None
    assert check.check(plan(CUDA_VISIBLE_DEVICES="2,3")) is None
    assert check.check(plan(CUDA_VISIBLE_DEVICES="")) is None
    assert check.check(plan(CUDA_VISIBLE_DEVICES="0,9")) == "GPU 9, which CUDA_VISIBLE_DEVICES names, is not there"


def test_fewer_gpus_than_there_were() -> None:
    """A GPU that has vanished since the agent began is missed by a job that needs it, and by no smaller one."""
    driver = FakeDriver(EIGHT)
    check = GpuCheck(driver)
    assert check.check(plan(ranks=8)) is None
    driver.answer = EIGHT[:7]
    assert check.check(plan(ranks=8)) == "7 GPUs are there, and there were 8"
    assert check.check(plan(ranks=7)) is None


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, None),
        ([], None),
        (
            DriverError("Driver/library version mismatch"),
            "the driver of the GPUs does not work: Driver/library version mismatch",
        ),
    ],
)
def test_a_node_without_gpus_is_fit_and_one_with_a_broken_driver_is_not(
    answer: Sequence[Gpu] | DriverError | None, says: str | None
) -> None:
    """Where there is nothing that could be broken a job starts; a driver that does not answer stops it."""
    assert GpuCheck(FakeDriver(answer)).check(plan()) == says


@pytest.mark.cuda
def test_a_real_driver() -> None:
    """The real driver tells of every GPU, by number and name."""
    pytest.importorskip("pynvml", reason="pip install 'ckptd[nvml]'")
    gpus = NvmlDriver().gpus()
    if gpus is None:
        pytest.skip("no GPU driver is loaded here")
    assert gpus
    assert all(gpu.uuid.startswith("GPU-") for gpu in gpus if gpu.gone is None)
