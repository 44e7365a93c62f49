"""Attaches something that ckptd refuses: `refused.py KIND`."""

import sys
import threading

import torch

import ckptd

kind = sys.argv[1]
if kind == "lock":
    state = {"model": torch.nn.Linear(2, 2), "extra": {"list": [1, threading.Lock()]}}
elif kind == "big":
    state = {"model": torch.nn.Linear(2, 2), "table": torch.zeros(64, 1024, 1024)}
else:
    state = {"model": torch.nn.Sequential(torch.nn.Linear(4, int(kind)))}
with ckptd.attach(**state) as run:
    for _ in run.steps(3):
        pass
