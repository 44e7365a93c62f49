"""Ways to checkpoint, behind one interface: ckptd, and what a user would pick instead."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import ckptd
from tests.bench.workload import Moments, Weights


class Contender:
    """One way, in one rank. `wanted` is set by the harness; `boundary` is called after each training step."""

    name = ""
    background = True
    """Whether training goes on before a checkpoint is durable."""

    def __init__(self, folder: Path, rank: int, state: dict[str, torch.Tensor]) -> None:
        self.folder, self.rank, self.state = folder, rank, state
        self.number = 0
        self.began = False
        """Whether the checkpoint asked for last has been taken at a boundary."""

    def request(self) -> None:
        """Ask for a checkpoint at one of the next boundaries."""
        self.began = False

    def boundary(self) -> None:
        """The end of a training step; the stall of a checkpoint happens in here."""
        if not self.began:
            self.began = True
            self.number += 1
            self.take(self.path)

    def optimizer_step(self) -> None:
        """The optimizer's step of a training step, which some must wait for."""

    @property
    def path(self) -> Path:
        """Where the checkpoint of this number lies."""
        return self.folder / f"c{self.number}"

    def take(self, path: Path) -> None:
        """Checkpoint the state as it is now; contenders whose own agent does that at a boundary leave it alone."""

    def durable(self) -> bool:
        """Whether this rank knows that the whole checkpoint is durable."""
        return True

    def load(self) -> None:
        """Bring the state back in place from the newest checkpoint, where a rank can do that while it trains."""

    def forget(self) -> None:
        """Remove the newest checkpoint, so that the disk does not fill."""
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(self.path, ignore_errors=True)

    def written_bytes(self) -> int:
        """Return the bytes of the newest checkpoint."""
        return sum(item.stat().st_size for item in self.path.rglob("*") if item.is_file())

    def close(self) -> None:
        """Let go of everything."""


class TorchSave(Contender):
    """`torch.save` of each rank's state, fsynced and renamed."""

    name = "torch.save + fsync"
    background = False

    def take(self, path: Path) -> None:
        """Write one file per rank."""
        path.mkdir(exist_ok=True)
        temporary = path / f"rank{self.rank}.tmp"
        with temporary.open("wb") as file:
            torch.save(self.state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path / f"rank{self.rank}.pt")
        folder = os.open(path, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        dist.barrier()

    def load(self) -> None:
        """Read the rank's file and copy its tensors into place."""
        loaded = torch.load(self.path / f"rank{self.rank}.pt", weights_only=True, mmap=True)
        for name, tensor in loaded.items():
            self.state[name].copy_(tensor)


class Dcp(Contender):
    """`torch.distributed.checkpoint.save`, which fsyncs each file."""

    name = "dcp.save"
    background = False

    def __init__(self, folder: Path, rank: int, state: dict[str, torch.Tensor]) -> None:
        super().__init__(folder, rank, state)
        self.group = dist.new_group(backend="gloo")  # its collectives run beside those of training

    def take(self, path: Path) -> None:
        """Write, and wait until all ranks have."""
        dcp.save(self.state, storage_writer=FileSystemWriter(path), process_group=self.group)

    def load(self) -> None:
        """Load in place."""
        dcp.load(self.state, storage_reader=FileSystemReader(self.path), process_group=self.group)


class DcpThread(Dcp):
    """`async_save` with its defaults: a new staging copy each time, written by a thread."""

    name = "dcp.async thread"
    background = True
    kind = AsyncCheckpointerType.THREAD
    stager: DefaultStager | None = None
    handle: Any = None

    def take(self, path: Path) -> None:
        """Stage on this thread, write in the background."""
        reply = dcp.async_save(
            self.state,
            checkpoint_id=path,
            process_group=self.group,
            async_checkpointer_type=self.kind,
            async_stager=self.stager,
        )
        self.handle = getattr(reply, "upload_completion", reply)

    def durable(self) -> bool:
        """Whether the background write has ended well."""
        if not self.handle.done():
            return False
        self.handle.result()
        return True

    def close(self) -> None:
        """Close the stager that was kept."""
        if self.stager is not None:
            self.stager.close()


class DcpThreadKept(DcpThread):
    """The same with one stager kept, so that its buffers are used again."""

    name = "dcp.async thread, kept stager"
    shared = False

    def __init__(self, folder: Path, rank: int, state: dict[str, torch.Tensor]) -> None:
        super().__init__(folder, rank, state)
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=self.shared, use_async_staging=False, use_non_blocking_copy=False
        )
        self.stager = DefaultStager(options)


class DcpProcess(DcpThread):
    """`async_save` by a process of its own."""

    name = "dcp.async process"
    kind = AsyncCheckpointerType.PROCESS


class DcpProcessKept(DcpThreadKept):
    """The same with a kept stager in shared memory."""

    name = "dcp.async process, kept stager"
    kind = AsyncCheckpointerType.PROCESS
    shared = True


class Ckptd(Contender):
    """ckptd, under `ckptctl run`."""

    name = "ckptd"

    def __init__(self, folder: Path, rank: int, state: dict[str, torch.Tensor]) -> None:
        super().__init__(folder, rank, state)
        self.module = Weights(state)
        self.optimizer = Moments(self.module, state)
        self.run = ckptd.attach(model=self.module, optimizer=self.optimizer, strict=True)
        self._step = 0
        self._before = -1

    def request(self) -> None:
        """Ask the agent, from one rank for all."""
        super().request()
        self._before = self.run._captured_step
        if self.rank == 0:
            self.run.checkpoint()

    def boundary(self) -> None:
        """End the step; the agent has announced one of the next."""
        self.run.step()
        if not self.began and self.run._captured_step != self._before:
            self.began = True
            self.number = self.run._captured_step

    def optimizer_step(self) -> None:
        """Let the optimizer's hooks run."""
        self.optimizer.step()

    @property
    def path(self) -> Path:
        """The checkpoint's folder in the store."""
        return self.folder / "store" / "bench" / "g000001" / f"s{self.number:012d}"

    def durable(self) -> bool:
        """Whether the manifest is there."""
        return (self.path / "manifest.json").exists()

    def forget(self) -> None:
        """Leave it to retention."""
        dist.barrier()

    def close(self) -> None:
        """Leave the run."""
        self.run.close()


CONTENDERS = {kind.name: kind for kind in (TorchSave, Dcp, DcpThread, DcpThreadKept, DcpProcess, DcpProcessKept, Ckptd)}
