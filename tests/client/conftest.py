"""Runs in the test's own process, with a fake agent or none, and nodes for those that need processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.client import run as run_module
from tests.client.fake_agent import FakeAgent
from tests.daemon.bytes_framework import FAULTS
from tests.daemon.harness import Node, open_descriptors


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment of rank 0 of 1 whose agent can only be at a place of the test's own; no run outlives the test."""
    for name in list(os.environ):
        if name.startswith(("CKPTD_", "XDG_RUNTIME", "RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    for name, value in {"HOME": tmp_path / "home", "SOCKET": tmp_path / "s", "JOB": "job"}.items():
        monkeypatch.setenv(f"CKPTD_{name}", str(value))
    before = open_descriptors()
    yield
    FAULTS.clear()
    for run in list(run_module._runs):
        run._unprotect()
    assert open_descriptors() == before


@pytest.fixture
def agent(tmp_path: Path, environment: None) -> Iterator[FakeAgent]:
    """An agent that answers as a real one would in the simplest case, and never announces anything by itself."""
    agent = FakeAgent(tmp_path / "s")
    yield agent
    for run in list(run_module._runs):
        run._unprotect()
    agent.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node of the test's own; none of its processes may outlive it."""
    node = Node(tmp_path)
    yield node
    node.close()
