"""Raises in its first life, beside a thread for which the interpreter waits for ever: `lingers.py STEPS STEP`."""

import os
import sys
import threading
import time

import ckptd
from tests.crash.state import advance, fresh

steps, bad = int(sys.argv[1]), int(sys.argv[2])
state = fresh(int(os.environ["RANK"]))
with ckptd.attach(**state) as run:
    for step in run.steps(steps):
        if step == bad and run.generation == 1:
            threading.Thread(target=time.sleep, args=(10**6,)).start()
            raise ValueError("no good")
        advance(state, step)
        time.sleep(0.02)
