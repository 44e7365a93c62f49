"""A small DDP training with everything that has state: dropout, momentum, a scheduler, a loader, a plain value.

train.py STEPS [--pause S] [--raise-at STEP] [--width N] [--die-in-capture STEP --rank R]
"""

import argparse
import os
import random
import signal
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import ckptd

parser = argparse.ArgumentParser()
parser.add_argument("steps", type=int)
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--raise-at", type=int)
parser.add_argument("--width", type=int, default=32)
parser.add_argument("--die-in-capture", type=int, default=0, help="die in the first capture from this step on")
parser.add_argument("--rank", type=int, default=1)
parser.add_argument("--job")
parser.add_argument("--store")
parser.add_argument("--every")
parser.add_argument("--hang")
args = parser.parse_args()

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(1 + rank)
np.random.seed(1 + rank)
random.seed(1 + rank)
net = nn.Sequential(nn.Linear(16, args.width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(args.width, 16))
with torch.no_grad():
    for parameter in net.parameters():
        parameter.fill_(0.01).add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.9)


def die_in_capture(slot, span, blob):
    """Stand in for the writing of the values: the tensors are in the slot, and the rank has not sealed it yet."""
    if now >= args.die_in_capture and int(os.environ["CKPTD_GENERATION"]) == 1:
        slot[span.begin : span.begin + 100] = b"x" * 100
        os.kill(os.getpid(), signal.SIGKILL)
    write_values(slot, span, blob)


now = 0
if args.die_in_capture and rank == args.rank:
    from ckptd_integrations.torch import capture

    write_values, capture.write_values = capture.write_values, die_in_capture

options = {key: value for key in ("job", "store", "every", "hang") if (value := getattr(args, key))}
with ckptd.attach(model=net, optimizer=optimizer, scheduler=scheduler, seen=0, **options) as run:
    print(f"generation {run.generation} restored {run.restored and (run.restored.step, run.restored.tier)}", flush=True)
    for step in run.steps(args.steps):
        now = step
        if step == args.raise_at:
            raise ValueError(f"no good at step {step}")
        noise = np.random.rand(16).astype("float32") * random.random()
        x = torch.randn(8, 16) + torch.from_numpy(noise)
        loss = (model(x) - x.roll(1, 1)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        run.state["seen"] += len(x)
        run.report(loss=loss)
        time.sleep(args.pause)
    assert run.state["seen"] == 8 * args.steps, run.state["seen"]
if world > 1:
    dist.destroy_process_group()
print("trained", flush=True)
