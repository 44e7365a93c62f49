"""An attached rank that waits for its dead peer for ever: `survivor.py STORE`."""

import os
import sys
import time

import ckptd
from tests.crash.state import advance, fresh
from tests.end_to_end.scripts.meeting import meet

rank = int(os.environ["RANK"])
state = fresh(rank)
with ckptd.attach(
    job="survivor", store=sys.argv[1], every="200ms", hang={"floor": "2s", "ceiling": "30s", "first": "60s"}, **state
) as run:
    peer = meet(rank)
    for step in run.steps(10**6):
        advance(state, step)
        try:
            peer.sendall(b"x")
            lost = peer.recv(1) != b"x"
        except OSError:
            lost = True
        while lost:
            time.sleep(1)
        time.sleep(0.02)
