"""Model launchers: ckptd's own, which forks ranks on demand and reports their ends, and a foreign one like torchrun."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptd.core import events as e
from ckptd.types import Evidence
from tests.simulation import takeover
from tests.simulation.clock import Channel, Steps
from tests.simulation.collective import Collective
from tests.simulation.ranks import RankProcess

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent
    from tests.simulation.node import Node


def evidence_of(process: RankProcess, at_s: float) -> Evidence | None:
    """Judge the end of a rank as the exit detector does."""
    code, rank = process.returncode, process.rank
    assert code is not None
    if code == 0:
        return None
    if code < 0:
        summary = f"rank {rank} was killed by signal {-code}"
        return Evidence("exit", "signal", rank, 1.0, summary, at_s, signal=-code, returncode=code)
    kind = "exception" if process.exception is not None else "exit"
    summary = f"rank {rank} ended with {code}"
    return Evidence("exit", kind, rank, 1.0, summary, at_s, returncode=code, exception=process.exception)


class Launcher:
    """The small parent process of supervised ranks. Orders reach it in order, and so do its reports the agent."""

    def __init__(self, node: Node, agent: ModelAgent) -> None:
        self.node, self._agent = node, agent
        self.alive = True
        self.ready = False
        self.reported = False
        self.generation = 0
        self.ranks: dict[int, RankProcess] = {}
        self._orders = Channel(node.clock, self, "order", node.latency_s)
        self._reports = Channel(node.clock, agent, "report", node.latency_s)
        node.clock.after(node.rng.uniform(0.0, 0.5), self, "launcher", self._imported)

    def _imported(self) -> None:
        self.ready = True
        self._reports.send(self._agent.launcher_ready, self)

    def spawn(self, generation: int) -> None:
        """Order: fork all ranks."""
        self._orders.send(self._begin, generation)
        collective = Collective(self.node)
        for rank in range(self.node.options.world_size):
            self._orders.send(self._fork, rank, generation, collective)

    def _begin(self, generation: int) -> None:
        self.generation = generation
        self.ranks = {}

    def _fork(self, rank: int, generation: int, collective: Collective) -> None:
        process = RankProcess(self.node, rank, self.node.next_pid(), generation, collective)
        self.ranks[rank] = process
        self._reports.send(self._agent.feed, e.RankSpawned(rank, process.pid))

    def kill_ranks(self, number: int) -> None:
        """Order: send every rank a signal. A rank stuck in a collective dies of SIGTERM too: the default action."""
        self._orders.send(self._kill_ranks, number)

    def _kill_ranks(self, number: int) -> None:
        for process in self.ranks.values():
            process.kill(number)

    def rank_ended(self, process: RankProcess) -> None:
        """Report an end to the agent."""
        if self.alive and self.ranks.get(process.rank) is process:
            self._reports.send(self._agent.rank_exited, process, self.node.clock.now_s)

    def orphan_ended(self, process: RankProcess, agent: ModelAgent) -> None:
        """Have the agent see an end by itself, once it knows of the rank: what this launcher has said comes first."""
        if self._agent is agent:
            self._reports.send(self._orphan_ended, process, agent, self.node.clock.now_s)
        else:
            self._orphan_ended(process, agent, self.node.clock.now_s)

    def _orphan_ended(self, process: RankProcess, agent: ModelAgent, at_s: float) -> None:
        self.node.clock.after(self.node.rng.uniform(0, 0.05), agent, "report", agent.rank_exited, process, at_s)

    def return_to(self, agent: ModelAgent) -> None:
        """Come back to another agent, once all that the one before has said is done."""
        self._orders.send(self._return_to, agent)

    def _return_to(self, agent: ModelAgent) -> None:
        """Tell an agent which ranks there are, and how those ended that have."""
        if not agent.alive:
            return
        self._agent, self.reported = agent, True
        self._reports = Channel(self.node.clock, agent, "report", self.node.latency_s)
        ended = [process for process in self.ranks.values() if not process.alive]
        self._reports.send(takeover.launcher_returned, agent, self, ended, self.node.clock.now_s)

    def die(self) -> None:
        """End without a word: ranks that train go on, the kernel ends the others."""
        if self.alive:
            self.alive = False
            for process in self.ranks.values():
                if not process.own_steps:
                    process.kill(9)
            self._reports.send(self._agent.launcher_died, self)

    def dissolve(self) -> None:
        """End, and every rank before."""
        self.alive = False
        for process in self.ranks.values():
            process.kill(9)


class ForeignLauncher:
    """A launcher that knows nothing of ckptd: when a rank dies it kills the others and starts all anew."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.alive = True
        self._restarting = False
        self._incarnation = 0
        self._ranks: list[RankProcess] = []
        self.begin_again()

    def begin_again(self) -> None:
        """Kill what there is and start all ranks: after a death, or because somebody runs the same command again."""
        self._incarnation += 1
        self._restarting = True
        self.node.clock.start(self, "launcher", self._kill_and_start(self._incarnation), self.node.rng.uniform(0, 0.3))

    def _kill_and_start(self, incarnation: int) -> Steps:
        rng = self.node.rng
        for process in self._ranks:
            process.kill(15)
        yield rng.uniform(0, 0.3)
        while not self.node.agent.alive:
            yield self.node.agent_back
        if incarnation != self._incarnation:
            return
        self._ranks, self._restarting = [], False
        collective = Collective(self.node)
        for rank in range(self.node.options.world_size):
            self._ranks.append(RankProcess(self.node, rank, self.node.next_pid(), 0, collective))
            yield rng.choice((0.0, 0.0, 0.5)) * rng.random()
            if incarnation != self._incarnation:
                return

    def rank_ended(self, process: RankProcess) -> None:
        """See the end of a rank; the agent sees it too, through its own pidfd."""
        if process in self._ranks and process.returncode != 0 and not self._restarting:
            self.begin_again()

    @property
    def finished(self) -> bool:
        """Whether every rank ended well."""
        complete = len(self._ranks) == self.node.options.world_size
        return complete and all(process.returncode == 0 for process in self._ranks)

    @property
    def processes(self) -> list[RankProcess]:
        """All processes that may be alive."""
        return self._ranks

    @property
    def ranks(self) -> dict[int, RankProcess]:
        """The present processes by rank."""
        return {process.rank: process for process in self._ranks}
