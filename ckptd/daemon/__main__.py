"""`ckptd`: the agent as a service, or embedded beside ranks that found no agent.

The service runs until it is told to stop. An embedded agent is started by the first rank's `attach`, serves every
rank of this user on this node, and ends after the last rank is gone and the last snapshot is durable.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence

from ckptd.config import AgentConfig
from ckptd.daemon.agent import Agent
from ckptd.daemon.notify import notify
from ckptd.errors import CkptdError
from ckptd.log import get_logger, set_up
from ckptd.version import __version__

_IDLE_POLL_S = 0.1
_FIRST_PEER_S = 20.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the agent; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="ckptd",
        description="The ckptd agent: coordinates checkpoints and restarts jobs. Talk to it with ckptctl.",
        epilog="Environment: CKPTD_HOME, CKPTD_SOCKET, CKPTD_MEMORY_MAX, CKPTD_PLUGINS_BLOCK, CKPTD_LOG_FORMAT.",
    )
    parser.add_argument("--embedded", action="store_true", help="end when no rank is left (started by ckptd.attach)")
    parser.add_argument("--debug", action="store_true", help="log decisions too, and show tracebacks")
    parser.add_argument("--version", action="version", version=f"ckptd {__version__}")
    options = parser.parse_args(arguments)
    try:
        config = AgentConfig.from_environ(os.environ)
        set_up(config.log_format, debug=options.debug)
        asyncio.run(_serve(config, embedded=options.embedded))
    except CkptdError as error:
        if options.debug:
            raise
        print(f"ckptd: error: {error.message}", file=sys.stderr)  # noqa: T201 - the one line for people
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


async def _serve(config: AgentConfig, *, embedded: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # Until an agent can take over the ranks of a dead one, ranks that it left behind would train unprotected.
    agent = Agent(config, foreground=False, on_agent_loss="end")
    get_logger().info("agent started", socket=str(config.socket), pid=os.getpid(), plugins=agent.plugins.loaded)
    notify("READY=1\nSTATUS=serving")
    idle = loop.create_task(_until_idle(agent, stop)) if embedded else None
    await stop.wait()
    if idle is not None:
        idle.cancel()
    notify("STOPPING=1")
    get_logger().info("agent stopping")
    await agent.close()


async def _until_idle(agent: Agent, stop: asyncio.Event) -> None:
    """Set `stop` once the last rank has gone; the first one gets some time to come."""
    for _ in range(int(_FIRST_PEER_S / _IDLE_POLL_S)):
        if agent.server.peers or agent.jobs:
            break
        await asyncio.sleep(_IDLE_POLL_S)
    while not agent.idle:  # noqa: ASYNC110 - idleness is the sum of many things, none of which is an event
        await asyncio.sleep(_IDLE_POLL_S)
    stop.set()


if __name__ == "__main__":
    sys.exit(main())
