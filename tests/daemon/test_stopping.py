"""The end of an agent that still has something to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ckptd.config import JobConfig
from ckptd.daemon import agent as agent_module
from tests.daemon.harness import AgentThread, Node, train_until


def test_an_upload_that_takes_hours_keeps_no_agent_from_ending(
    node: Node, start_agent: Callable[..., AgentThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that is told to end waits for uploads no longer than its grace time, and what is on the disk stays."""
    monkeypatch.setattr(agent_module, "_END_S", 0.2)
    agent = start_agent()
    stores = [{"url": str(node.store)}, {"url": str(node.folder / "far"), "upload_max": "1KB/s"}]
    config = {"name": "job", "command": [], "nproc": 1, "every_s": 0.1, "store": stores}
    agent.call(lambda: agent.agent.submit(JobConfig.from_json(config)))
    puppet = node.puppet()
    puppet.attach(10_000_000)
    train_until([puppet], lambda: agent.committed() > 1, "two commits")
    puppet.kill()
    agent.grace_s = 0.5
    agent.close()
    (skipped,) = agent.events("upload skipped")
    assert skipped["hint"] == "the next start of the job uploads it"
    assert node.manifests()
    assert not list((node.folder / "far").glob("job/*/*/manifest.json"))
