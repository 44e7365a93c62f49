"""Trains with a DataLoader whose workers are forked anew in each epoch, while attached: `loader.py STEPS`."""

import os
import sys
import time

import torch
from torch.utils.data import DataLoader, Dataset

import ckptd
from ckptd.client.run import current_run


class Squares(Dataset):
    """Numbers, squared in a worker, which has no run of its own."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        assert current_run() is None, "a worker has the rank's run"
        maps = open("/proc/self/maps").read()
        assert "memfd:ckptd" not in maps, "a worker has the rank's memory"
        return torch.tensor(float(index * index))


steps = int(sys.argv[1])
torch.set_num_threads(1)
total = torch.zeros(())
with ckptd.attach(total=total) as run:
    todo = run.steps(steps)
    for step in todo:
        for batch in DataLoader(Squares(), batch_size=4, num_workers=2, multiprocessing_context="fork"):
            total += batch.sum()
        if step == 4 and run.generation == 1 and os.environ["RANK"] == "1":
            workers = DataLoader(Squares(), batch_size=1, num_workers=1, multiprocessing_context="fork")
            waiting = iter(workers)  # alive when its rank dies
            next(waiting)
            while not any(os.scandir(os.path.join(os.getcwd(), "runs", "loader", "g000001"))):
                time.sleep(0.01)
            os.kill(os.getpid(), 9)
print(f"total {total.item():g} generation {run.generation}", flush=True)
