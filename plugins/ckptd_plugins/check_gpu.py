"""Whether the GPUs that a job's ranks will use are there and sound, by NVML where there is one (`ckptd[nvml]`).

A node without NVML, its driver or GPUs is fit: there is nothing that could be broken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ckptd.plugin import NodeCheck, NodePlan, hookimpl

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the driver says of one GPU; None for what it can't tell."""

    index: int
    uuid: str = ""
    gone: str | None = None
    """Why it does not answer: it has fallen off the bus, or must be reset."""
    uncorrected: int | None = None
    """Memory errors since the driver was loaded that ECC could not correct."""
    mending: bool | None = None
    """Whether memory waits for a reset to be taken out of use."""
    worn_out: bool | None = None
    """Whether memory could not be taken out of use any more."""


class Driver(Protocol):
    """The driver's side: what there is to know of GPUs."""

    def gpus(self) -> Sequence[Gpu] | None:
        """Return every GPU of the node, None without a driver; raises `DriverError` for one that does not work."""
        ...


class DriverError(Exception):
    """Raised when there is a driver and it can't be used."""


def unsound(gpu: Gpu) -> str | None:
    """Return why a GPU should not be trained on. Pure.

    Errors that ECC could not correct count until the memory they were in is out of use: newer GPUs do that by
    themselves, and say when it takes a reset or has failed.
    """
    if gpu.gone is not None:
        return f"GPU {gpu.index} {gpu.gone}"
    if gpu.worn_out:
        return f"GPU {gpu.index} has memory errors and no spare rows left: it should be replaced"
    if gpu.mending:
        return f"GPU {gpu.index} has memory errors and needs a reset (nvidia-smi --gpu-reset)"
    if gpu.uncorrected and gpu.mending is None:
        return f"GPU {gpu.index} has had {gpu.uncorrected} memory errors that ECC could not correct"
    return None


def chosen(visible: str | None, ranks: int, gpus: Sequence[Gpu]) -> tuple[list[Gpu], list[str]]:
    """Return the GPUs that ranks will use, and what `CUDA_VISIBLE_DEVICES` names that is not there. Pure.

    Without that variable they are the first ones, one a rank. A part of a GPU (MIG) is not looked at.
    """
    if visible is None:
        return list(gpus[:ranks]), []
    found: list[Gpu] = []
    missing: list[str] = []
    for word in filter(None, map(str.strip, visible.split(","))):
        if word.startswith(("MIG-", "-")):
            continue
        gpu = next((item for item in gpus if _is(item, word)), None)
        if gpu is None:
            missing.append(word)
        else:
            found.append(gpu)
    return found, missing


def _is(gpu: Gpu, word: str) -> bool:
    return gpu.index == int(word) if word.isdecimal() else bool(gpu.uuid) and gpu.uuid.startswith(word)


class GpuCheck:
    """Asks the driver about the GPUs of a job before its ranks start."""

    name = "gpu"

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._most = 0
        """How many GPUs there were at best."""

    def check(self, plan: NodePlan) -> str | None:
        """Return what is wrong with the GPUs that the ranks will see."""
        visible = plan.env.get(_VISIBLE)
        if visible is not None and not visible.strip(" ,"):
            return None  # it wants none
        try:
            gpus = self._driver.gpus()
        except DriverError as error:
            return f"the driver of the GPUs does not work: {error}"
        if gpus is None:
            return None
        self._most = max(self._most, len(gpus))
        wanted, missing = chosen(visible, plan.ranks, gpus)
        problems = [f"GPU {word}, which {_VISIBLE} names, is not there" for word in missing]
        if visible is None and len(gpus) < min(self._most, plan.ranks):
            problems.append(f"{len(gpus)} GPUs are there, and there were {self._most}")
        problems += [reason for gpu in wanted if (reason := unsound(gpu)) is not None]
        return "; ".join(problems) or None


class NvmlDriver:
    """NVIDIA's management library. It is loaded at the first question, and kept: that takes a while."""

    def __init__(self) -> None:
        self._nvml: Any = None

    def gpus(self) -> Sequence[Gpu] | None:
        """Return every GPU of the node."""
        try:
            import pynvml  # type: ignore[import-untyped, unused-ignore]  # noqa: PLC0415 - an extra, for GPU nodes
        except ImportError:
            return None
        absent = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        try:
            if self._nvml is None:
                pynvml.nvmlInit()
                self._nvml = pynvml
            return [self._gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError as error:
            self._nvml = None
            if error.value in absent:
                return None
            raise DriverError(str(error)) from error

    def _gpu(self, index: int) -> Gpu:
        nvml = self._nvml
        gone = {
            nvml.NVML_ERROR_GPU_IS_LOST: "has fallen off the bus",
            nvml.NVML_ERROR_RESET_REQUIRED: "must be reset",
        }
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = str(nvml.nvmlDeviceGetUUID(handle))
            kinds = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            uncorrected = self._ask(nvml.nvmlDeviceGetTotalEccErrors, handle, *kinds)
            rows = self._ask(nvml.nvmlDeviceGetRemappedRows, handle)
            if rows is None:
                pages = self._ask(nvml.nvmlDeviceGetRetiredPagesPendingStatus, handle)
                return Gpu(index, uuid, None, uncorrected, True if pages else None)
            return Gpu(index, uuid, None, uncorrected, bool(rows[2]), bool(rows[3]))
        except nvml.NVMLError as error:
            if error.value in gone:
                return Gpu(index, gone=gone[error.value])
            raise

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return an answer, None where this kind of GPU or driver has none."""
        nvml = self._nvml
        none = (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND, nvml.NVML_ERROR_NO_PERMISSION)
        try:
            return function(*arguments)
        except nvml.NVMLError as error:
            if error.value in none:
                return None
            raise


@hookimpl
def ckptd_check_node() -> list[NodeCheck]:
    """Register the check of GPUs."""
    return [GpuCheck(NvmlDriver())]
