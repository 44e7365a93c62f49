"""`cleans.py PAUSE_S`: a loop of its own around `step()`, and something to clean up when it ends; no torch."""

import sys
import time
from pathlib import Path

import ckptd

run = ckptd.attach(data=bytearray(64))
with run:
    try:
        while True:
            time.sleep(float(sys.argv[1]))
            run.step()
            if run.stopping:
                Path("told").touch()
    finally:
        Path("cleaned").touch()
Path("taken-for-finished").touch()
