"""`ckptd`: the agent as a service, or embedded beside ranks that found no agent.

The service begins with the jobs that the one before it had, and runs until it is told to stop: by SIGTERM or SIGINT
together with its jobs, each with a last checkpoint; by SIGUSR2 alone, as if it were killed, since that is what the next
agent must be able to go on from anyway. An embedded agent is started by the first rank's `attach`, serves every rank of
this user on this node, and ends after the last rank is gone and the last snapshot is durable.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Sequence

from ckptd.config import AgentConfig
from ckptd.daemon.agent import Agent
from ckptd.daemon.comeback import Comebacks
from ckptd.daemon.notify import Watchdog, notify, watchdog_s
from ckptd.daemon.supervisor import Supervisor
from ckptd.errors import CkptdError
from ckptd.log import get_logger, set_up
from ckptd.process_end import Unawaited, end_without_waiting
from ckptd.version import __version__

_IDLE_POLL_S = 0.1
_FIRST_PEER_S = 20.0
_TAKEN_OVER_S = 30.0
_EACH_JOB_S = 120
"""What systemd is asked to wait for each job that comes back before it takes the start for stuck."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the agent; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="ckptd",
        description="The ckptd agent: coordinates checkpoints and restarts jobs, and brings back those that it had "
        "when it ended. Talk to it with ckptctl.",
        epilog="SIGTERM: stop with all jobs, each with a last checkpoint. SIGUSR2: hand over to the next agent; jobs "
        "train on. Environment: CKPTD_HOME, CKPTD_SOCKET, CKPTD_MEMORY_MAX, CKPTD_PLUGINS_BLOCK, CKPTD_LOG_FORMAT.",
    )
    parser.add_argument("--embedded", action="store_true", help="end when no rank is left (started by ckptd.attach)")
    parser.add_argument("--debug", action="store_true", help="log decisions too, and show tracebacks")
    parser.add_argument("--version", action="version", version=f"ckptd {__version__}")
    options = parser.parse_args(arguments)
    try:
        config = AgentConfig.from_environ(os.environ)
        set_up(config.log_format, debug=options.debug)
        faulthandler.enable()  # systemd's watchdog ends an agent that hangs by SIGABRT: this says where it hung
        asyncio.run(_embedded(config) if options.embedded else _service(config))
    except CkptdError as error:
        if options.debug:
            raise
        print(f"ckptd: error: {error.message}", file=sys.stderr)  # noqa: T201 - the one line for people
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)  # noqa: T201
        return end_without_waiting(error.exit_code)
    return end_without_waiting(0)


async def _embedded(config: AgentConfig) -> None:
    """Serve ranks until the last one has gone, or somebody stops this."""
    stop, agent = _begin(config, service=False)
    idle = asyncio.get_running_loop().create_task(_until_idle(agent, stop))
    await stop.wait()
    idle.cancel()
    get_logger().info("agent stopping")
    await agent.close()


async def _service(config: AgentConfig) -> None:
    """Serve until told to stop, and begin with the jobs that the service had when it ended."""
    stop, agent = _begin(config, service=True)
    alone = asyncio.Event()

    def end_alone() -> None:
        alone.set()
        stop.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, end_alone)
    watchdog = Watchdog(watchdog_s(os.environ, os.getpid()))
    watchdog.start()
    comebacks = Comebacks(agent.journal, agent.adopt, agent.runs, agent.kept, get_logger())
    back = comebacks.begin(lambda: notify(f"EXTEND_TIMEOUT_USEC={_EACH_JOB_S * 1_000_000}"))
    await _until_taken_over(back, stop)
    notify("READY=1\nSTATUS=serving")
    await stop.wait()
    notify("STOPPING=1")
    comebacks.close()
    if alone.is_set():
        get_logger().info("agent hands over")
        await agent.hand_over()
        os._exit(0)  # nothing that an orderly end closes may be closed
    get_logger().info("agent stopping")
    await agent.close()
    watchdog.stop()


async def _until_taken_over(jobs: Sequence[Supervisor], stop: asyncio.Event) -> None:
    """Wait until all that these jobs had is here, or something has become of them; a rank may be in a long step."""
    end_s = time.monotonic() + _TAKEN_OVER_S
    while any(job.machine.adopting and not job.ended.done() for job in jobs):
        if stop.is_set() or time.monotonic() > end_s:
            break
        await asyncio.sleep(_IDLE_POLL_S)


def _begin(config: AgentConfig, *, service: bool) -> tuple[asyncio.Event, Agent]:
    """Start the agent; return it with an event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    asyncio.get_running_loop().set_default_executor(Unawaited())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    agent = Agent(config, foreground=False, on_agent_loss="keep" if service else "end", service=service)
    get_logger().info("agent started", socket=str(config.socket), pid=os.getpid(), plugins=agent.plugins.loaded)
    return stop, agent


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
