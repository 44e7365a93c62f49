"""`large.py STEPS MIB`: one rank, whose state is so large and no two pages of it are alike; no torch."""

import random
import sys

import ckptd

steps, size_mib = int(sys.argv[1]), int(sys.argv[2])
data = bytearray(random.Random(1).randbytes(size_mib * 2**20))
with ckptd.attach(data=data, seen=0) as run:
    for step in run.steps(steps):
        data[:8] = step.to_bytes(8, "little")
        run.state["seen"] += 1
