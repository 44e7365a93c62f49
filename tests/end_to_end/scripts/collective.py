"""Two gloo ranks, of which rank 1 stalls: `collective.py STEPS KIND STEP`, in the first life alone.

KIND "deadlock" has it wait for the other in another collective, all others are those of `stalls`.
"""

import sys
import time

import torch
import torch.distributed as dist

import ckptd
from tests.end_to_end.scripts.stalls import stall

steps, kind, stuck_at = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo")
total = torch.zeros(4)
with ckptd.attach(total=total) as run:
    for step in run.steps(steps):
        if step == stuck_at and run.generation == 1 and dist.get_rank() == 1:
            dist.barrier() if kind == "deadlock" else stall(kind)
        dist.all_reduce(total)
        total.fill_(step)
        time.sleep(0.02)
dist.destroy_process_group()
