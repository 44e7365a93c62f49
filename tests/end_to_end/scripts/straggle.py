"""Two gloo ranks of which rank 1 sleeps inside its forward while a file is there: `straggle.py SLOW_FILE END_FILE`."""

import os
import sys
import time

import torch
from torch import nn

import ckptd

slow, end = sys.argv[1:]
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)


class Net(nn.Module):
    """A layer, and a pause."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x):
        """Run the layer; slowly, if that is wanted of this rank."""
        if rank == 1 and os.path.exists(slow):
            time.sleep(0.05)
        return self.layer(x)


model = nn.parallel.DistributedDataParallel(Net())
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with ckptd.attach(model=model, optimizer=optimizer) as run:
    for _ in run.steps(10**6):
        time.sleep(0.01)
        model(torch.ones(4, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ended = torch.tensor([float(os.path.exists(end))])
        torch.distributed.all_reduce(ended)
        if ended.item() == 2:
            break
