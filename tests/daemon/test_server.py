"""The agent's socket: nobody else's business, greeted before anything else, and one agent for each place."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from ckptd.daemon.server import Peer, Server
from ckptd.errors import AgentError, ProtocolError
from ckptd.protocol import endpoint
from ckptd.protocol.channel import Channel, open_channel
from ckptd.protocol.messages import PROTOCOL_VERSION, Done, Hello, Message, Refused, Request, Welcome
from tests.daemon.harness import PATIENCE_S, eventually, open_descriptors

FRAMEWORKS = [{"name": "bytes", "trigger": "ckptd", "target": "a:b"}]


class Listening:
    """A server that answers every request with `Done`, and what it has seen."""

    def __init__(self, path: Path) -> None:
        self.received: list[tuple[Peer, Message]] = []
        self.closed: list[Peer] = []
        self.server = Server(path, FRAMEWORKS, self._received, self.closed.append)

    def _received(self, peer: Peer, message: Message) -> None:
        self.received.append((peer, message))
        peer.send(Done())


def serve(path: Path, work: Callable[[Listening], Coroutine[Any, Any, None]]) -> None:
    """Run a test beside a server; no descriptor and no name may be left of it."""

    async def main() -> None:
        listening = Listening(path)
        try:
            await asyncio.wait_for(work(listening), PATIENCE_S)
        finally:
            listening.server.close()

    before = open_descriptors()
    asyncio.run(main())
    assert open_descriptors() == before
    assert not path.exists()


async def blocking(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call what blocks beside the loop that serves it."""
    return await asyncio.to_thread(function, *arguments)


def test_only_the_owner_may_use_the_socket(tmp_path: Path) -> None:
    """The socket's mode is 0600 from its first moment, and a folder made for it is 0700, whatever the umask says."""
    path = tmp_path / "deep" / "ckptd.sock"
    modes: list[int] = []

    async def work(_: Listening) -> None:
        modes.extend(stat.S_IMODE(place.stat().st_mode) for place in (path, path.parent))

    before = os.umask(0)
    try:
        serve(path, work)
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert modes == [0o600, 0o700]


def test_a_greeting_is_answered_with_a_welcome(tmp_path: Path) -> None:
    """After hello a peer knows the agent's pid and its frameworks, and the agent knows role and pid by the kernel."""

    async def work(listening: Listening) -> None:
        channel, welcome = await blocking(open_channel, str(listening.server.path), "rank", PATIENCE_S)
        assert welcome == Welcome(os.getpid(), FRAMEWORKS)
        assert await blocking(channel.call, Request(3), PATIENCE_S) == Done()
        ((peer, message),) = listening.received
        assert (peer.role, peer.pid, message) == ("rank", os.getpid(), Request(3))
        assert listening.server.peers == {peer}
        channel.close()
        await eventually(lambda: listening.closed)
        assert listening.closed == [peer]
        assert not listening.server.peers

    serve(tmp_path / "s", work)


def test_a_greeting_comes_first(tmp_path: Path) -> None:
    """A request before the greeting is refused in words, the connection closed, and no handler ever sees it."""

    async def work(listening: Listening) -> None:
        channel = Channel(endpoint.connect(str(listening.server.path), PATIENCE_S))
        with pytest.raises(AgentError, match="must begin with a hello"):
            await blocking(channel.call, Request(3), PATIENCE_S)
        with pytest.raises(AgentError, match="closed the connection"):
            await blocking(channel.receive, PATIENCE_S)
        channel.close()
        assert not listening.received
        assert not listening.closed

    serve(tmp_path / "s", work)


@pytest.mark.parametrize(
    ("version", "older"), [(PROTOCOL_VERSION - 1, "this client is older"), (PROTOCOL_VERSION + 1, "this side is older")]
)
def test_another_version_is_refused_in_words(tmp_path: Path, version: int, older: str) -> None:
    """A client of another version is told both versions and which side is older."""

    async def work(listening: Listening) -> None:
        channel = Channel(endpoint.connect(str(listening.server.path), PATIENCE_S))
        await blocking(channel.send, Hello("rank", 1, version), PATIENCE_S)
        answer = await blocking(channel.receive, PATIENCE_S)
        assert isinstance(answer, Refused)
        assert f"protocol version {version}, this side {PROTOCOL_VERSION}" in answer.error["message"]
        assert older in answer.error["hint"]
        channel.close()
        assert not listening.server.peers

    serve(tmp_path / "s", work)


def test_a_greeting_with_unknown_fields_of_another_version(tmp_path: Path) -> None:
    """A newer client whose greeting says more than ours knows is still told which side is older."""

    async def work(listening: Listening) -> None:
        from ckptd.protocol.codec import encode

        stream = endpoint.connect(str(listening.server.path), PATIENCE_S)
        stream.sendall(encode({"type": "hello", "role": "rank", "pid": 1, "version": 99, "shiny": True}))
        channel = Channel(stream)
        answer = await blocking(channel.receive, PATIENCE_S)
        assert isinstance(answer, Refused)
        assert answer.error["code"] == ProtocolError.code
        channel.close()

    serve(tmp_path / "s", work)


def test_connections_that_say_nothing_cost_nothing(tmp_path: Path) -> None:
    """Ungreeted connections are no peers, disturb nobody, and are closed with the server."""

    async def work(listening: Listening) -> None:
        silent = [endpoint.connect(str(listening.server.path), PATIENCE_S) for _ in range(20)]
        channel, _ = await blocking(open_channel, str(listening.server.path), "ctl", PATIENCE_S)
        assert len(listening.server.peers) == 1
        for stream in silent[:10]:
            stream.close()
        assert await blocking(channel.call, Request(1), PATIENCE_S) == Done()
        assert not listening.closed
        for stream in silent[10:]:
            stream.close()
        channel.close()

    serve(tmp_path / "s", work)


STRANGER = """
import os, socket, sys
os.chdir(sys.argv[1])
os.setgid(65534); os.setgroups([]); os.setuid(65534)
stream = socket.socket(socket.AF_UNIX)
stream.settimeout(20)
try:
    stream.connect("s")
except PermissionError:
    print("kept out"); sys.exit()
try:
    stream.sendall(bytes.fromhex(sys.argv[2]))
    print("heard", stream.recv(1000))
except (ConnectionResetError, BrokenPipeError):
    print("heard", b"")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user, to be turned away as one")
@pytest.mark.parametrize(("mode", "said"), [(0o600, "kept out"), (0o666, "heard b''")])
def test_another_user_is_turned_away(tmp_path: Path, mode: int, said: str) -> None:
    """The mode keeps other users out; and where it would not, the kernel's word on who they are does."""
    os.chmod(tmp_path, 0o711)

    async def work(listening: Listening) -> None:
        from ckptd.protocol.codec import encode
        from ckptd.protocol.messages import to_frame

        os.chmod(listening.server.path, mode)
        greeting = encode(to_frame(Hello("ctl", 1))).hex()
        command = [sys.executable, "-c", STRANGER, str(tmp_path), greeting]
        result = await blocking(lambda: subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S))
        assert result.stdout.strip() == said, result.stderr
        assert not listening.server.peers
        assert not listening.server._by_connection

    serve(tmp_path / "s", work)


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    """A name that a killed agent left behind, or any dead file, is no obstacle."""
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "s"))
    stale.close()
    for path in (tmp_path / "s", tmp_path / "plain"):
        path.touch()

        async def work(listening: Listening) -> None:
            channel, _ = await blocking(open_channel, str(listening.server.path), "ctl", PATIENCE_S)
            channel.close()

        serve(path, work)


def test_a_living_agent_is_not_replaced(tmp_path: Path) -> None:
    """A second agent at the same place is refused with a hint, and the first goes on."""

    async def work(listening: Listening) -> None:
        with pytest.raises(AgentError, match="another agent listens") as refused:
            Server(listening.server.path, [], lambda *_: None, lambda _: None)
        assert "CKPTD_SOCKET" in str(refused.value.hint)
        channel, _ = await blocking(open_channel, str(listening.server.path), "ctl", PATIENCE_S)
        channel.close()

    serve(tmp_path / "s", work)


def test_the_socket_of_a_successor_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that ends while the next one starts removes its own name, never that of the next one."""
    path = tmp_path / "s"

    second: list[Listening] = []
    unlink = Path.unlink

    def try_to_start() -> None:
        if not second:
            with contextlib.suppress(AgentError):
                second.append(Listening(path))

    def race(self: Path, missing_ok: bool = False) -> None:
        monkeypatch.setattr(Path, "unlink", unlink)
        try_to_start()
        unlink(self, missing_ok)
        try_to_start()
        monkeypatch.setattr(Path, "unlink", race)

    async def main() -> None:
        first = Listening(path)
        monkeypatch.setattr(Path, "unlink", race)
        first.server.close()
        monkeypatch.setattr(Path, "unlink", unlink)
        assert second
        channel, _ = await blocking(open_channel, str(path), "ctl", PATIENCE_S)
        channel.close()
        second[0].server.close()

    asyncio.run(main())


def test_very_long_paths(tmp_path: Path) -> None:
    """A socket deeper than the 107 bytes of a socket address works for both sides, stale or not."""
    path = tmp_path / ("d" * 100) / ("e" * 100) / "ckptd.sock"

    async def work(listening: Listening) -> None:
        channel, _ = await blocking(open_channel, str(path), "rank", PATIENCE_S)
        assert await blocking(channel.call, Request(1), PATIENCE_S) == Done()
        channel.close()
        with pytest.raises(AgentError, match="another agent listens"):
            Server(path, [], lambda *_: None, lambda _: None)

    serve(path, work)
    path.touch()
    serve(path, work)


@pytest.mark.parametrize("place", ["file/ckptd.sock", "n" * 300])
def test_an_impossible_place_is_refused(tmp_path: Path, place: str) -> None:
    """A place where no socket can be is an error with the place, the reason and a hint."""
    (tmp_path / "file").touch()

    async def main() -> None:
        with pytest.raises(AgentError, match=r"can't listen at .*: .*(directory|exists|long)") as refused:
            Listening(tmp_path / place)
        assert "CKPTD_SOCKET" in str(refused.value.hint)

    before = open_descriptors()
    asyncio.run(main())
    assert open_descriptors() == before
