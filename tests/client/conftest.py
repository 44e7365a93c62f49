"""Runs in the test's own process, with a fake agent or none, and nodes for those that need processes."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ckptd
from ckptd.client import run as run_module
from ckptd.client.run import Run
from ckptd.protocol import messages as m
from tests.client import fake_framework
from tests.client.fake_agent import FakeAgent
from tests.client.fake_framework import BOUND, FakeBinding
from tests.client.harness import Begin, announce
from tests.daemon.harness import Node, open_descriptors


def end_runs() -> None:
    """Have every run let go of everything."""
    fake_framework.let_all_go()
    for run in list(run_module._runs):
        run._end()


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment of rank 0 of 1 whose agent can only be at a place of the test's own; no run outlives the test."""
    for name in list(os.environ):
        if name.startswith(("CKPTD_", "XDG_RUNTIME", "RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    fixed = {"HOME": tmp_path / "home", "SOCKET": tmp_path / "s", "JOB": "job", "OVERLAP": "off"}
    for name, value in fixed.items():
        monkeypatch.setenv(f"CKPTD_{name}", str(value))
    before = open_descriptors()
    with fake_framework.clean():
        yield
        end_runs()
    if open_descriptors() != before:
        gc.collect()  # the traceback of what a test has caught may hold the control page
    assert open_descriptors() == before


@pytest.fixture
def agent(tmp_path: Path, environment: None) -> Iterator[FakeAgent]:
    """An agent that answers as a real one would in the simplest case, and never announces anything by itself."""
    agent = FakeAgent(tmp_path / "s")
    yield agent
    end_runs()
    agent.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node of the test's own; none of its processes may outlive it."""
    node = Node(tmp_path)
    yield node
    node.close()


@pytest.fixture
def begin(agent: FakeAgent) -> Begin:
    """Attach some state, finish the first step, and capture the second beside what follows."""

    def begin(*, overlap: str = "on", strict: bool = False, **state: Any) -> tuple[Run, FakeBinding]:
        run = ckptd.attach(overlap=overlap, strict=strict, **(state or {"data": bytearray(b"step"), "epoch": 1}))
        (binding,) = BOUND
        run.step()
        agent.wait_for(m.Stepped)
        binding.held = True
        announce(agent, run)
        return run, binding

    return begin
