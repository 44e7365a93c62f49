"""The training script that is killed: a model under AdamW on every rank, a step of 30 ms or more, an all-reduce each.

`recover_toy.py CONTENDER FOLDER MIB DEVICE [transformers]`: with "ckptd" it is checkpointed by ckptd, with "dcp" by
itself, every 20 steps, with torch.distributed.checkpoint. Each rank appends what it has reached, one JSON line each, to
FOLDER/events, stamped with the machine's monotonic clock.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_MAIN_S = time.monotonic()
_EVERY_STEPS = 20
_WORK_S = 0.03
_LAYERS = 12
_BYTES_PER_PARAMETER = 12
"""A float32 and its two moments."""


class Events:
    """What this rank has reached, and when."""

    def __init__(self, folder: Path) -> None:
        self._rank = int(os.environ["RANK"])
        self._file = os.open(folder / "events", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def note(self, what: str, at_s: float | None = None, **more: Any) -> None:
        """Write one event down."""
        at_s = time.monotonic() if at_s is None else at_s
        line = {"what": what, "rank": self._rank, "pid": os.getpid(), "at_s": at_s, **more}
        os.write(self._file, (json.dumps(line) + "\n").encode())


def began_s() -> float:
    """Return when this process was made, to 10 ms."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    since_boot_s = ticks / os.sysconf("SC_CLK_TCK")
    return since_boot_s - time.clock_gettime(time.CLOCK_BOOTTIME) + time.monotonic()


def main(contender: str, folder: Path, mib: int, device: str) -> None:
    """Train until somebody ends it."""
    events = Events(folder)
    events.note("start", began_s())
    events.note("main", _MAIN_S)
    if "transformers" in sys.argv[5:]:
        from transformers import AutoModelForCausalLM  # noqa: F401 - what such a script pays for
    import torch
    import torch.distributed as dist

    if contender == "dcp":
        import torch.distributed.checkpoint
    else:
        import ckptd
    events.note("imported")
    dist.init_process_group("gloo")
    events.note("joined")
    torch.set_num_threads(1)
    torch.manual_seed(1)
    width = int((mib * 2**20 / _BYTES_PER_PARAMETER / _LAYERS) ** 0.5)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False, device=device) for _ in range(_LAYERS)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    gradients = [torch.full_like(parameter, 1e-3) for parameter in model.parameters()]
    small, work = torch.ones(1000), torch.rand(256, 256)

    def train() -> None:
        until_s = time.monotonic() + _WORK_S
        while time.monotonic() < until_s:
            work @ work
        dist.all_reduce(small)
        small.fill_(1.0)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()

    if contender == "dcp":
        _with_dcp(folder, events, model, optimizer, train)
        return
    events.note("built")
    with ckptd.attach(model=model, optimizer=optimizer) as run:
        events.note("restored", step=0 if run.restored is None else run.restored.step)
        for step in run.steps(10**9):
            train()
            events.note("step", step=step)


def _with_dcp(folder: Path, events: Events, model: Any, optimizer: Any, train: Any) -> None:
    import torch.distributed.checkpoint as dcp

    for parameter in model.parameters():  # what `dcp.load` fills has to be there
        parameter.grad = parameter.detach() * 0.0
    optimizer.step()
    state: dict[str, Any] = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, moments in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
    events.note("built")
    done = folder / "dcp"
    newest = max((int(item.parent.name) for item in done.glob("*/.metadata")), default=0)  # renamed into place last
    if newest:
        dcp.load(state, checkpoint_id=str(done / str(newest)))
    events.note("restored", step=newest)
    for step in range(newest + 1, 10**9):
        train()
        events.note("step", step=step)
        if not step % _EVERY_STEPS:
            dcp.save(state, checkpoint_id=str(done / str(step)))
            events.note("saved", step=step)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
