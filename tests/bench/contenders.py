"""Ways to checkpoint, behind one interface: ckptd, and what torch itself offers. `peers.py` has other projects'."""

from __future__ import annotations

import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save

from tests.bench.workload import Training


class Contender:
    """One way, in one rank: `request`, then `boundary` after each step until `durable`; `taken` says which took it."""

    background = True
    """Whether training goes on before a checkpoint is durable."""
    warm_ups = 1
    """How many checkpoints of each kind of loop are taken before the first that counts."""

    def __init__(self, folder: Path, rank: int, training: Training) -> None:
        self.folder, self.rank, self.training = folder, rank, training
        self.state = training.state()
        self.number = 0
        self.boundaries = 0
        self.taken = 0
        """The number of the boundary that took the newest checkpoint, known once it is durable."""
        self._due = False

    def request(self) -> None:
        """Ask for a checkpoint at one of the next boundaries."""
        self._due = True

    def boundary(self) -> None:
        """The end of a training step; the stall of a checkpoint happens in here."""
        self.boundaries += 1
        if self._due:
            self._due = False
            self.taken = self.boundaries
            self.number += 1
            self.take(self.path)

    @property
    def path(self) -> Path:
        """Where the newest checkpoint lies."""
        return self.folder / f"c{self.number}"

    def take(self, path: Path) -> None:
        """Checkpoint the state as it is now; a contender whose own agent does that at a boundary leaves it alone."""

    def durable(self) -> bool:
        """Whether this rank knows that the whole checkpoint is durable."""
        return not self._due

    def forget(self) -> None:
        """Remove the newest checkpoint, so that the disk does not fill."""
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(self.path, ignore_errors=True)

    def written_bytes(self) -> int:
        """Return the bytes that the newest checkpoint has taken on the disk."""
        return sum(item.stat().st_size for item in self.path.rglob("*") if item.is_file())

    def helpers(self) -> list[int]:
        """Return the processes beside this rank that work for it."""
        return [child.pid for child in psutil.Process().children(recursive=True)]

    def close(self) -> None:
        """Let go of everything."""


class Loading(Contender, ABC):
    """A way that also brings a checkpoint back into a rank that trains; ckptd restores new ranks, see `restore.py`."""

    @abstractmethod
    def load(self) -> None:
        """Bring the state back in place from the newest checkpoint."""


class Nothing(Contender):
    """No checkpoint at all, for 0.8 s: what the other figures would be if there were only noise."""

    def take(self, path: Path) -> None:
        """Note the time."""
        self._over_s = time.monotonic() + 0.8

    def durable(self) -> bool:
        """Whether the time is over."""
        return not self._due and time.monotonic() > self._over_s


class TorchSave(Loading):
    """`torch.save` of each rank's state, fsynced and renamed."""

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


class Dcp(Loading):
    """`torch.distributed.checkpoint.save`, which fsyncs each file."""

    background = False

    def __init__(self, folder: Path, rank: int, training: Training) -> None:
        super().__init__(folder, rank, training)
        self.group = dist.new_group(backend="gloo")  # its collectives run beside those of training

    def take(self, path: Path) -> None:
        """Write, and wait until all ranks have."""
        save(self.state, storage_writer=FileSystemWriter(path), process_group=self.group)

    def load(self) -> None:
        """Load in place."""
        load(self.state, storage_reader=FileSystemReader(self.path), process_group=self.group)


class DcpAsync(Dcp):
    """`async_save`: a staging copy on the training thread, then a thread or a process writes."""

    background = True

    def __init__(
        self, folder: Path, rank: int, training: Training, kind: AsyncCheckpointerType, stager: DefaultStager | None
    ) -> None:
        super().__init__(folder, rank, training)
        self._kind, self._stager = kind, stager
        self._handle: Any = None

    def take(self, path: Path) -> None:
        """Stage on this thread, write in the background."""
        reply = async_save(
            self.state,
            checkpoint_id=path,
            process_group=self.group,
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )
        self._handle = getattr(reply, "upload_completion", reply)

    def durable(self) -> bool:
        """Whether the background write has ended well."""
        if self._due or not self._handle.done():
            return False
        self._handle.result()
        return True

    def close(self) -> None:
        """Close the stager that was kept."""
        if self._stager is not None:
            self._stager.close()


class DcpStaged(DcpAsync):
    """`async_save` whose staging copy runs beside training, too, as far as the next step of the optimizer."""

    def __init__(self, folder: Path, rank: int, training: Training) -> None:
        options = StagingOptions(
            use_pinned_memory=True, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=True
        )
        super().__init__(folder, rank, training, AsyncCheckpointerType.THREAD, DefaultStager(options))
        self._staged: Any = None
        assert training.optimizer is not None
        training.optimizer.register_step_pre_hook(self._wait)

    def take(self, path: Path) -> None:
        """Begin to stage."""
        reply: Any = async_save(
            self.state, checkpoint_id=path, process_group=self.group, async_stager=self._stager,
            async_checkpointer_type=self._kind,
        )  # fmt: skip
        self._handle, self._staged = reply.upload_completion, reply.staging_completion

    def _wait(self, *_: Any) -> None:
        if self._staged is not None:
            self._staged.result()
            self._staged = None


def _stager(*, shared: bool, pinned: bool) -> DefaultStager:
    """Return a stager to keep, so that its buffers are used again; page-locked ones take a device's copies faster."""
    options = StagingOptions(
        use_pinned_memory=pinned, use_shared_memory=shared, use_async_staging=False, use_non_blocking_copy=pinned
    )
    return DefaultStager(options)


class Ckptd(Contender):
    """ckptd, under `ckptctl run`; which way it captures, the run's `--overlap` says."""

    def __init__(self, folder: Path, rank: int, training: Training) -> None:
        super().__init__(folder, rank, training)
        import ckptd

        objects: dict[str, Any] = {"model": training.model}
        if training.optimizer is not None:
            objects["optimizer"] = training.optimizer
        if training.shape.replicated:
            self.run = ckptd.attach(**objects, strict=True, replicated=tuple(objects))
        else:
            self.run = ckptd.attach(**objects, strict=True)
        self.boundaries = self.run.restored.step if self.run.restored else 0
        self._store = folder / "store" / "bench"

    def request(self) -> None:
        """Ask the agent, from one rank for all; it names one of the next steps."""
        if self.rank == 0:
            self.run.checkpoint()

    def boundary(self) -> None:
        """End the step."""
        self.boundaries += 1
        self.run.step()

    def durable(self) -> bool:
        """Whether there is a newer manifest than before."""
        for generation in self._store.glob("g*"):
            for name in os.listdir(generation):
                step = int(name[1:]) if name[0] == "s" else 0
                if step > self.number and (generation / name / "manifest.json").exists():
                    self.number = self.taken = step
                    return True
        return False

    @property
    def path(self) -> Path:
        """The newest checkpoint's folder in the store."""
        return next(self._store.glob(f"g*/s{self.number:012d}"))

    def forget(self) -> None:
        """Leave it to retention."""
        dist.barrier()

    def helpers(self) -> list[int]:
        """Return the agent, the parent of the launcher that forked this rank; rank 0 answers for all."""
        launcher = psutil.Process().parent()
        agent = launcher.parent() if launcher else None
        return [agent.pid] if agent and self.rank == 0 else []

    def close(self) -> None:
        """Leave the run."""
        self.run.close()


class CkptdAuto(Ckptd):
    """The same choosing between both ways of capture by what each costs in this job: it has to try both first."""

    warm_ups = 6


Maker = Callable[[Path, int, Training], Contender]


def _dcp_async(kind: AsyncCheckpointerType, *, keep: bool) -> Maker:
    """Return how to make `async_save` with the default stager, or with one that is kept and suits its kind."""

    def make(folder: Path, rank: int, training: Training) -> Contender:
        shared = kind is AsyncCheckpointerType.PROCESS
        stager = _stager(shared=shared, pinned=training.on_device) if keep else None
        return DcpAsync(folder, rank, training, kind, stager)

    return make


CONTENDERS: dict[str, Maker] = {
    "no checkpoint (noise)": Nothing,
    "torch.save + fsync": TorchSave,
    "dcp.save": Dcp,
    "dcp.async thread": _dcp_async(AsyncCheckpointerType.THREAD, keep=False),
    "dcp.async thread, kept stager": _dcp_async(AsyncCheckpointerType.THREAD, keep=True),
    "dcp.async thread, staged beside": DcpStaged,
    "dcp.async process": _dcp_async(AsyncCheckpointerType.PROCESS, keep=False),
    "dcp.async process, kept stager": _dcp_async(AsyncCheckpointerType.PROCESS, keep=True),
    "ckptd overlap=on": Ckptd,
    "ckptd overlap=off": Ckptd,
    "ckptd overlap=auto": CkptdAuto,
}
