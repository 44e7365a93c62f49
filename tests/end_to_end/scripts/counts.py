"""A resumable function without supervisor: `counts.py STEPS PAUSE`."""

import sys
import time

import torch

import ckptd

steps, pause = int(sys.argv[1]), float(sys.argv[2])


@ckptd.resumable(every="100ms", store="runs")
def count(run: ckptd.Run) -> None:
    """Sum random numbers."""
    torch.manual_seed(3)
    total = torch.zeros(3)
    run.attach(total=total)
    print(f"from {run.restored and run.restored.step} generation {run.generation}", flush=True)
    for _ in run.steps(steps):
        total += torch.rand(3)
        time.sleep(pause)
    print(f"total {total.tolist()}", flush=True)


count()
