"""Nodes, agents and a look at what tests leave behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.harness import AgentThread, Node, open_descriptors, until, use_bytes_framework
from tests.daemon.speaker import Speaker


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node of the test's own; none of its processes may outlive it."""
    node = Node(tmp_path)
    yield node
    node.close()


@pytest.fixture
def start_agent(node: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., AgentThread]]:
    """Start agents in threads; when they have ended, no descriptor is left of them."""
    use_bytes_framework(monkeypatch)
    before = open_descriptors()
    started: list[AgentThread] = []

    def start(**config: Any) -> AgentThread:
        started.append(AgentThread(node, **config))
        return started[-1]

    yield start
    for puppet in node.puppets:
        puppet.kill()
    for agent in started:
        agent.close()
    until(lambda: open_descriptors() <= before, "the closing of every descriptor")


@pytest.fixture
def agent(start_agent: Callable[..., AgentThread]) -> AgentThread:
    """An agent in a thread, with the adapter for plain bytes."""
    return start_agent()


@pytest.fixture
def speaker(node: Node, agent: AgentThread) -> Iterator[Speaker]:
    """A rank that has greeted the agent."""
    speaker = Speaker(node)
    yield speaker
    speaker.close()
