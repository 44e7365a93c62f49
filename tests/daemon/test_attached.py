from __future__ import annotations
from tests.daemon.harness import *

def test_try(node, agent):
    """x"""
    p = node.puppet()
    assert p.attach() == [1, None, None]
    p.train_until(lambda: agent.committed(), "commit")
    p.kill()
    until(lambda: agent.status()["state"] == "pending", "pending")
    q = node.puppet()
    print(q.attach(), node.incidents())
    q.do("run.close()")
    q.end()
    until(lambda: agent.status()["state"] == "finished", "x")
