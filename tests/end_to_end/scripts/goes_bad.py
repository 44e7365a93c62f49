"""A small DDP training whose loss goes bad, and that skips what it is told to skip.

goes_bad.py STEPS [--pause S] [--bad STEP --kind nan|spike --rank R] [--skip FIRST-LAST] [--deaf]
    [--numbers P] [--hang P]
"""

import argparse
import os
import random
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import ckptd

parser = argparse.ArgumentParser()
parser.add_argument("steps", type=int)
parser.add_argument("--pause", type=float, default=0.01)
parser.add_argument("--bad", type=int, default=0, help="the step whose batch is bad")
parser.add_argument("--kind", default="nan")
parser.add_argument("--rank", type=int, default=0)
parser.add_argument("--skip", default="", help="steps to skip from the beginning, as if they had been found bad")
parser.add_argument("--deaf", action="store_true", help="skip nothing that ckptd says")
parser.add_argument("--numbers", help="what to attach with")
parser.add_argument("--hang", help="what to attach with")
parser.add_argument("--job")
parser.add_argument("--store")
args = parser.parse_args()

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(1)
net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 16))
model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
torch.manual_seed(2 + rank)
np.random.seed(2 + rank)
random.seed(2 + rank)
skipped = set()
if args.skip:
    first, last = map(int, args.skip.split("-"))
    skipped.update(range(first, last + 1))


def skip(first: int, last: int) -> None:
    """Note which batches are to be skipped."""
    print(f"skip {first} to {last}", flush=True)
    skipped.update(range(first, last + 1))


def batch(step: int) -> torch.Tensor:
    """Draw the batch of a step; the draw of a bad one is spoilt."""
    x = torch.randn(8, 16)
    if step == args.bad and rank == args.rank:
        x *= float("nan") if args.kind == "nan" else 1e3
    return x


options = {key: value for key in ("job", "store", "numbers", "hang") if (value := getattr(args, key))}
if "store" in options:
    options["every"] = "200ms"
with ckptd.attach(model=net, optimizer=optimizer, skip_data=None if args.deaf else skip, **options) as run:
    print(f"generation {run.generation} restored {run.restored and run.restored.step}", flush=True)
    assert args.deaf or args.skip or run.skipped == skipped
    for step in run.steps(args.steps):
        x = batch(step)
        if step not in skipped:
            loss = (model(x) - x.roll(1, 1)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.report(loss=loss)
        time.sleep(args.pause)
if world > 1:
    dist.destroy_process_group()
print("trained", flush=True)
