"""A small training of two ranks over gloo that does to itself what the test orders: `victim.py PAUSE_S WIDTH`.

An order is a file `order-<rank>` in the working directory with one word; the rank that finds it removes it, writes
the time to `did-<rank>` and obeys. A file `end` with a number in it is the step at which training ends.
"""

import collections
import itertools
import math
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import ckptd

rank, pause_s, width = int(os.environ["RANK"]), float(sys.argv[1]), int(sys.argv[2])
order, end = f"order-{rank}", Path("end")
ordered = ""
BAD_BATCH = {"nan": math.nan, "spike": 1e3}
torch.set_num_threads(1)
torch.manual_seed(1 + rank)
np.random.seed(1 + rank)
random.seed(1 + rank)


def look() -> str:
    """Return what is ordered, once."""
    if not os.path.exists(order):
        return ""
    word = Path(order).read_text()
    os.unlink(order)
    Path(f"did-{rank}").write_text(repr(time.time()))
    return word


class Net(nn.Module):
    """A layer whose forward fails when it is ordered to."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, width), nn.Linear(width, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if ordered == "exception":
            raise ArithmeticError("no good in forward")
        return self.narrow(self.wide(x).relu())


def obey() -> None:
    """Do what is no matter of the model."""
    match ordered:
        case "exit":
            sys.exit(3)
        case "oom":
            hoard = []
            while True:
                hoard.append(b"x" * 2**22)
        case "deadlock":  # the other one waits in an all-reduce, this one for a message that nobody sends
            dist.recv(torch.zeros(1), src=1 - rank)
        case "python loop":
            while True:
                math.sqrt(2.0)
        case "c loop":  # one call that never returns and never lets another thread run
            collections.deque(itertools.count(), maxlen=0)


dist.init_process_group("gloo")
net = Net()
with torch.no_grad():
    for parameter in net.parameters():
        parameter.copy_(torch.linspace(-0.01, 0.01, parameter.numel()).view_as(parameter))
model = nn.parallel.DistributedDataParallel(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
with ckptd.attach(model=net, optimizer=optimizer, seen=0) as run:
    for step in run.steps(10**9):
        if end.exists() and step > int(end.read_text()):
            break
        ordered = look()
        obey()
        x = torch.randn(8, 16) * BAD_BATCH.get(ordered, 1.0)
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.state["seen"] += 1
        run.report(loss=loss)
        time.sleep(pause_s)
    assert run.state["seen"] == int(end.read_text()), run.state["seen"]
dist.destroy_process_group()
