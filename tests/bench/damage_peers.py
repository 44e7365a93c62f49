"""What torch.save and torch.distributed.checkpoint load after damages; prints JSON, one object for each damage."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from tests.bench.damage import DAMAGES, MIB, biggest
from tests.bench.plan import Shape
from tests.bench.workload import Training

Load = Callable[[dict[str, torch.Tensor], Path], None]
REFUSALS = (CheckpointException, RuntimeError, OSError, ValueError, KeyError, EOFError)


class Torn(io.RawIOBase):
    """A file whose writer dies at half of the bytes."""

    def __init__(self, path: Path, limit: int) -> None:
        super().__init__()
        self._file = path.open("wb")
        self._left = limit

    def write(self, data: Any) -> int:
        """Write, or die."""
        size = memoryview(data).nbytes
        self._left -= size
        if self._left < 0:
            self._file.flush()
            os._exit(1)
        return self._file.write(data)

    def writable(self) -> bool:
        """Yes."""
        return True


class DiesLate(FileSystemWriter):
    """Dies with all data written, before the metadata."""

    def finish(self, metadata: Any, results: Any) -> None:
        """Die."""
        os._exit(1)


class DiesMidway(FileSystemWriter):
    """Dies with half of the data written."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write half, and die."""
        half = dataclasses.replace(plan, items=plan.items[: len(plan.items) // 2])
        super().write_data(half, planner)
        os._exit(1)


def torch_save(state: dict[str, torch.Tensor], path: Path, file: Any = None) -> None:
    """Save as most scripts do: over the file that is there."""
    torch.save(state, file or path / "state.pt")


def torch_load(state: dict[str, torch.Tensor], path: Path) -> None:
    """Load in place."""
    for name, tensor in torch.load(path / "state.pt", weights_only=True).items():
        state[name].copy_(tensor)


def dcp_save(state: dict[str, torch.Tensor], path: Path, kind: type[FileSystemWriter] = FileSystemWriter) -> None:
    """Save, one file for each tensor."""
    save_state(state, storage_writer=kind(path, single_file_per_rank=False), no_dist=True)


def dcp_load(state: dict[str, torch.Tensor], path: Path) -> None:
    """Load in place."""
    load_state(state, storage_reader=FileSystemReader(path), no_dist=True)


def verdict(load: Load, path: Path, old: str, new: str) -> str:
    """Return in words what a load brings."""
    training = Training(0, Shape(MIB, 30))
    training.change()
    training.change()
    training.change()
    try:
        load(training.state(), path)
    except REFUSALS as error:
        return f"refused: {type(error).__name__}"
    got = training.fingerprint()
    return {old: "loads the older one", new: "loads, right"}.get(got, "LOADS WRONG, no word")


def die(work: Callable[[], None]) -> None:
    """Do something that kills its process in a fork."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    os.waitpid(pid, 0)


def _rows(folder: Path) -> list[dict[str, str]]:
    training = Training(0, Shape(MIB, 30))
    old = training.fingerprint()
    older = folder / "older"
    for save in (torch_save, dcp_save):
        (older / save.__name__).mkdir(parents=True)
        save(training.state(), older / save.__name__)
    training.change()
    new, state = training.fingerprint(), training.state()

    def tried(save: Any, load: Load, spoil: Callable[[Path], None], *, over: bool) -> str:
        path = Path(tempfile.mkdtemp(dir=folder))
        if over:
            shutil.copytree(older / save.__name__, path, dirs_exist_ok=True)
        spoil(path)
        said = verdict(load, path, old, new)
        shutil.rmtree(path)
        return said

    rows = []
    for damage in DAMAGES.values():
        row = {}
        for title, save, load in (("torch.save", torch_save, torch_load), ("dcp", dcp_save, dcp_load)):

            def spoil(path: Path, save: Any = save, damage: Callable[[Path], None] = damage) -> None:
                save(state, path)
                damage(biggest(path))

            row[title] = tried(save, load, spoil, over=False)
        rows.append(row)
    size = training.state_bytes()
    late = tried(dcp_save, dcp_load, lambda path: die(lambda: dcp_save(state, path, DiesLate)), over=True)
    rows.append({"torch.save": "-", "dcp": late.replace("right", "what was never committed")})

    def tear(path: Path) -> None:
        die(lambda: torch_save(state, path, Torn(path / "state.pt", size // 2)))

    rows.append({
        "torch.save": f"{tried(torch_save, torch_load, tear, over=True)}, and the older one is lost",
        "dcp": tried(dcp_save, dcp_load, lambda path: die(lambda: dcp_save(state, path, DiesMidway)), over=True),
    })  # fmt: skip
    return rows


if __name__ == "__main__":
    print(json.dumps(_rows(Path(sys.argv[1]))))
