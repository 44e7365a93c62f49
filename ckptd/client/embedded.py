"""Reaching an agent: the one that runs, or an embedded one started for the life of this node's ranks."""

from __future__ import annotations

import fcntl
import os
import sys
import time

from ckptd.client.guard import say
from ckptd.errors import AgentError, ProtocolError
from ckptd.protocol import endpoint
from ckptd.protocol.channel import Channel, open_channel
from ckptd.protocol.messages import Welcome

_GREET_DEADLINE_S = 5.0
_START_DEADLINE_S = 30.0
_DIAL_EVERY_S = 0.1


def reach_agent(path: str, *, may_start: bool, wait_s: float = 0.0) -> tuple[Channel, Welcome]:
    """Return a channel to the agent at `path`; raises `AgentError` when there is none and none may be started.

    One that is to come back within `wait_s` is waited for.
    """
    end_s = time.monotonic() + wait_s
    found = _try(path)
    while found is None and time.monotonic() < end_s:
        time.sleep(_DIAL_EVERY_S)
        found = _try(path)
    if found is not None:
        return found
    if not may_start:
        raise AgentError(f"no agent listens at {path}", hint="was it stopped? `ckptctl status` tells")
    try:
        return _try_or_start(path)
    except OSError as error:
        raise AgentError(f"no agent can be started: {error}", hint="set CKPTD_HOME to a folder of your own") from error


def _try_or_start(path: str) -> tuple[Channel, Welcome]:
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    # One rank of the node starts it, the others find it when they get the lock.
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _try(path) or _start(path)
    finally:
        os.close(lock)


def _try(path: str) -> tuple[Channel, Welcome] | None:
    try:
        return open_channel(path, "rank", _GREET_DEADLINE_S)
    except (OSError, AgentError):
        return None  # nobody there, or on its way out: as good as nobody


def _start(path: str) -> tuple[Channel, Welcome]:
    import subprocess  # noqa: PLC0415 - only the first rank without an agent needs it

    home = endpoint.home(os.environ)
    os.makedirs(home, exist_ok=True)
    log = os.path.join(home, "agent.log")
    with open(log, "ab") as output:  # noqa: PTH123 - no pathlib in the client
        process = subprocess.Popen(
            [sys.executable, "-m", "ckptd.daemon", "--embedded"],
            env={**os.environ, "CKPTD_SOCKET": path, "CKPTD_HOME": home},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,  # a Ctrl-C for the training must not end it before the last flush
        )
    end_s = time.monotonic() + _START_DEADLINE_S
    while time.monotonic() < end_s:
        found = _try(path)
        if found is not None:
            say(f"no daemon is running: started an embedded agent (pid {process.pid}), which ends with this training")
            process.returncode = 0  # it is nobody's child to wait for; keeps Popen from warning
            return found
        if process.poll() is not None:
            raise AgentError(f"the embedded agent ended at once with {process.returncode}", hint=f"see {log}")
        time.sleep(0.02)
    process.kill()
    process.wait()
    raise AgentError(f"the embedded agent was not ready within {_START_DEADLINE_S:g} s", hint=f"see {log}")


def pick_framework(offered: list[dict[str, str]]) -> str:
    """Return the "module:attribute" of the adapter whose framework this process has imported, else the first."""
    if not offered:
        raise ProtocolError("the agent has no framework adapter", hint="install ckptd[torch] where the agent runs")
    for item in offered:
        if item["trigger"] in sys.modules:
            return item["target"]
    return offered[0]["target"]
