"""One rank on a GPU, with NCCL: `device.py STEPS KIND STEP`, something bad at that step in the first life alone.

KIND "none" trains on, "collective" waits for a sum behind work that never ends, "nan" makes the loss no number.
"""

import math
import os
import sys

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or products may differ from run to run

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import ckptd

steps, kind, bad_at = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.cuda.set_device(0)
dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
torch.manual_seed(1)
np.random.seed(1)
net = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Dropout(0.2), nn.Linear(1024, 256)).cuda()
model = nn.parallel.DistributedDataParallel(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
with ckptd.attach(model=net, optimizer=optimizer) as run:
    print(f"generation {run.generation} restored {run.restored and (run.restored.step, run.restored.tier)}", flush=True)
    for step in run.steps(steps):
        x = torch.randn(64, 256, device="cuda")
        loss = (model(x) - x.roll(1, 1)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bad = step == bad_at and run.generation == 1
        if bad and kind == "collective":
            torch.cuda._sleep(2**62)
            dist.all_reduce(loss.detach())
            torch.cuda.synchronize()
        run.report(loss=loss * math.nan if bad and kind == "nan" else loss)
        torch.cuda.synchronize()
dist.destroy_process_group()
print("trained", flush=True)
