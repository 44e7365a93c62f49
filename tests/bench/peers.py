"""Other projects' ways to checkpoint, each measured when it is installed, see `catalogue.why_not`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.bench.contenders import Loading, Maker
from tests.bench.workload import Training


class Dlrover(Loading):
    """DLRover's Flash Checkpoint: a copy to shared memory, written by an agent's thread. It fsyncs no tensor file."""

    def __init__(self, folder: Path, rank: int, training: Training) -> None:
        super().__init__(folder, rank, training)
        ddp = importlib.import_module("dlrover.trainer.torch.flash_checkpoint.ddp")

        self._disk = ddp.StorageType.DISK
        self._checkpointer = ddp.DdpCheckpointer(str(folder / "dlrover"), local_shard_num=2, global_shard_num=2)

    @property
    def path(self) -> Path:
        """The folder of the newest step."""
        return self.folder / "dlrover" / str(self.number)

    def take(self, path: Path) -> None:
        """Copy to shared memory; the agent is told to write it."""
        file = str(path / f"rank_{self.rank}.pt")
        self._checkpointer.save_checkpoint(self.number, self.state, file, storage_type=self._disk)

    def durable(self) -> bool:
        """Whether the tracker names this step."""
        tracker = self.folder / "dlrover" / "dlrover_latest.txt"
        return not self._due and tracker.exists() and tracker.read_text().strip() == str(self.number)

    def load(self) -> None:
        """Read the rank's file and copy its tensors into place."""
        loaded = torch.load(self.path / f"rank_{self.rank}.pt", weights_only=True, mmap=True)
        loaded = loaded.get("model_states", loaded)
        for name, tensor in loaded.items():
            self.state[name].copy_(tensor)


class Nvrx(Loading):
    """nvidia-resiliency-ext's `TorchAsyncCheckpoint`: a copy, then `torch.save` in a process of its own."""

    def __init__(self, folder: Path, rank: int, training: Training) -> None:
        super().__init__(folder, rank, training)
        module = importlib.import_module("nvidia_resiliency_ext.checkpointing.async_ckpt.torch_ckpt")
        self._checkpoint: Any = module.TorchAsyncCheckpoint()

    def take(self, path: Path) -> None:
        """Copy, and schedule the write."""
        path.mkdir(exist_ok=True)
        self._checkpoint.async_save(self.state, path / f"rank{self.rank}.pt")

    def durable(self) -> bool:
        """Whether the writer has finished; it does not fsync."""
        if self._due:
            return False
        self._checkpoint.finalize_async_save(blocking=False)
        return bool(self._checkpoint._async_calls_queue.get_num_unfinalized_calls() == 0)

    def load(self) -> None:
        """Read the rank's file and copy its tensors into place."""
        loaded = torch.load(self.path / f"rank{self.rank}.pt", weights_only=True, mmap=True)
        for name, tensor in loaded.items():
            self.state[name].copy_(tensor)

    def close(self) -> None:
        """End the writing process."""
        self._checkpoint.finalize_async_save(blocking=True, terminate=True)
        dist.barrier()


PEERS: dict[str, Maker] = {"DLRover Flash Checkpoint": Dlrover, "nvidia-resiliency-ext": Nvrx}
