"""Attaches a state without torch, and raises an exception in the block: `raises.py STEP`."""

import sys

import ckptd

with ckptd.attach(data=bytearray(1000)) as run:
    for step in run.steps(10**6):
        if step == int(sys.argv[1]):
            raise ValueError(f"no good at step {step}")
