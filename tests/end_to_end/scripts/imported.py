"""Attaches a model and its optimizer and says what it began with: `imported.py STEPS`."""

import os
import sys

import torch

import ckptd

torch.manual_seed(11)
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
with ckptd.attach(model=model, optimizer=optimizer) as run:
    if os.environ["RANK"] == "0":
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, os.environ["BEGAN_WITH"])
        print(f"began after step {run.restored.step}", flush=True)
    for _ in run.steps(int(sys.argv[1])):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
