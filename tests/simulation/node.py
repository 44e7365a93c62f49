"""One simulated node: puts the parts together, injects faults, and runs until the job is finished.

`run(seed)` is the whole of a simulation. The same seed and options give the same run, event for event.
"""

from __future__ import annotations

import random
from collections import deque
from itertools import count
from typing import Any

from ckptd.core import events as e
from ckptd.core.handover import Handover
from ckptd.core.job_states import JobState
from tests.simulation import takeover
from tests.simulation.agent import ModelAgent
from tests.simulation.bucket import Bucket
from tests.simulation.clock import Clock, Signal
from tests.simulation.disk import Disk, File
from tests.simulation.faults import Faults
from tests.simulation.launchers import ForeignLauncher, Launcher
from tests.simulation.options import Options
from tests.simulation.ranks import RankProcess
from tests.simulation.storage import BUCKET
from tests.simulation.witness import Witness
from tests.simulation.witness_hangs import HangWitness
from tests.simulation.witness_numbers import NumbersWitness

TRACE_LINES = 60
LIVENESS_S = 600.0
EVENTS_MAX = 300_000


class SimulationError(AssertionError):
    """A run that broke the design; says which seed to replay."""

    def __init__(self, seed: int, options: Options, problem: BaseException, trace: list[str]) -> None:
        lines = "\n  ".join(trace)
        super().__init__(
            f"{type(problem).__name__}: {problem}\n"
            f"replay: python -m tests.simulation --first {seed} --seeds 1 --trace\n{options}\n  {lines}"
        )
        self.problem = problem


class Node:
    """A machine with a disk, one agent at a time, and a job that must finish however often something dies."""

    def __init__(self, seed: int, options: Options) -> None:
        self.options = options
        self.rng = random.Random(seed)
        self.alive = True
        self.clock = Clock()
        self.disk = Disk()
        self.bucket = Bucket(self.clock, seed)
        self.witness = Witness(self)
        self.numbers = NumbersWitness(self)
        self.hangs = HangWitness(self)
        self.faults = Faults(self)
        self.trace: deque[tuple[float, str, Any]] = deque(maxlen=TRACE_LINES)
        self.agent_deaths = 0
        self.finished = False
        self.stop_ordered = False
        self.agent_back = Signal(self.clock)
        self._pids = count(100)
        self.foreign: ForeignLauncher | None = None
        self.launcher: Launcher | None = None
        """The last one that an agent has started."""
        self.journal = Handover(JobState.PENDING.value)
        """What the present agent would leave to the next one."""
        self.agent = ModelAgent(self)
        self.agent.start()
        if not options.supervised:
            self.foreign = ForeignLauncher(self)

    # --- small things -----------------------------------------------------------------------------------------

    def next_pid(self) -> int:
        """Return a process number that nobody had before."""
        return next(self._pids)

    def latency_s(self) -> float:
        """Return how long a message takes."""
        return self.rng.uniform(0, self.options.latency_s)

    def note(self, kind: str, what: Any) -> None:
        """Add a line to the trace."""
        self.trace.append((self.clock.now_s, kind, what))

    def write_fails(self) -> bool:
        """Whether the disk refuses a write now."""
        return self.faults.writes_may_fail and self.rng.random() < self.options.write_error_chance

    def is_full(self, file: File) -> bool:
        """Whether the disk has no room for another file."""
        bound = self.options.disk_files if self.faults.writes_may_fail else 0
        return bool(bound) and file not in self.disk.files and len(self.disk.files) >= bound

    def place(self, tier: str) -> Disk:
        """Return what a tier holds."""
        return self.bucket if tier == BUCKET else self.disk

    def fault_point(self, kind: str) -> None:
        """Let something go wrong, perhaps."""
        self.faults.point(kind)

    # --- deaths and returns -----------------------------------------------------------------------------------

    def rank_ended(self, process: RankProcess) -> None:
        """Let everybody who watches a rank see its end."""
        self.note("exit", (process, process.returncode))
        if not self.options.supervised:
            if self.foreign is not None:
                self.foreign.rank_ended(process)
            if process in self.agent.connections:
                at_s = self.clock.now_s
                self.clock.after(self.rng.uniform(0, 0.05), self.agent, "report", self.agent.rank_exited, process, at_s)
            elif process.pid in self.agent.orphans:
                self.clock.after(0.0, self.agent, "report", takeover.orphan_ended, self.agent, process.pid)
        elif self.launcher is not None and self.launcher.alive:
            self.launcher.rank_ended(process)
        elif self.launcher is not None and self.launcher.ranks.get(process.rank) is process:
            self.launcher.orphan_ended(process, self.agent)
        self.witness.takeovers.forget_lost()

    def kill_agent(self) -> None:
        """Kill -9 the agent; an embedded one takes its ranks along. Somebody runs the same command again."""
        self.note("fault", "the agent is killed")
        self.agent_deaths += 1
        self.witness.agent_killed()
        self.agent.die()
        self._replace_agent()

    def lose_agent(self) -> None:
        """Kill -9 the agent of a service: launcher and ranks go on, and after a while another one takes over."""
        self.note("fault", "the agent is killed, and its ranks go on")
        self.agent_deaths += 1
        self.witness.agent_killed()
        self.agent.alive = False
        self.agent_back = Signal(self.clock)
        self.clock.after(self.rng.uniform(0.1, 2.0), self, "agent", self._take_over)

    def _take_over(self) -> None:
        if self.foreign is not None and not any(process.alive for process in self.foreign.processes):
            self.foreign.begin_again()  # there is nothing to take over: somebody runs the same command again
            self._start_agent()
            return
        self.note("agent", "takes over")
        back = self.agent_back  # another one if this agent dies in its first moment
        self.agent = ModelAgent(self, self.journal)
        self.witness.agent_takes_over()
        self.agent.start()
        back.fire()
        for process in self.processes():
            if process.alive:
                self.clock.after(self.rng.uniform(0, 0.1), process, "rank", process.agent_is_back)

    def processes(self) -> list[RankProcess]:
        """Return the processes that may be alive."""
        if self.foreign is not None:
            return self.foreign.processes
        return [] if self.launcher is None else list(self.launcher.ranks.values())

    def lose_disk(self) -> None:
        """Lose the machine with its disk: the job goes on upon another one."""
        self.note("fault", "the disk is lost")
        self.kill_agent()
        self.disk = Disk()
        self.witness.disk_lost()

    def _replace_agent(self) -> None:
        self.agent_back = Signal(self.clock)
        if self.foreign is not None:
            for process in self.foreign.ranks.values():
                process.kill(9)
            self.foreign.begin_again()
        self.clock.after(self.rng.uniform(0.1, 0.5), self, "agent", self._start_agent)

    def _start_agent(self) -> None:
        self.note("agent", "started")
        self.stop_ordered = False
        self.witness.agent_begins()
        self.numbers.agent_begins()
        back = self.agent_back
        self.agent = ModelAgent(self)
        self.agent.start()
        back.fire()

    def job_ended(self, end: e.End) -> None:
        """Judge the end of the job; run it again when it ended for a good reason before it was finished."""
        self.note("end", end)
        witness = self.witness
        if end.error is not None:
            if self.numbers.excuses(end.error):
                self.finished = True  # the same command would end in the same way, until somebody decides
                return
            excused = witness.hopeless() or witness.bucket.excuses(end.error)
            witness.require(excused, f"the job ends with an error: {end.error}")
        elif end.outcome == JobState.FINISHED.value:
            if self.foreign is not None and not self.foreign.finished:
                self._start_agent()  # its launcher has restarted a rank after the last commit: they come back
                return
            witness.job_finished()
            self.numbers.job_finished()
            self.finished = True
            return
        else:
            stopped = self.stop_ordered and end.outcome == JobState.STOPPED.value
            witness.require(stopped, f"the job ends as {end.outcome}")
        self.agent.alive = False
        self._replace_agent()

    # --- the run ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until the job is finished; raises when something breaks the design or nothing happens any more."""
        deadline_s = None
        while not self.finished:
            kind = self.clock.step(self.fault_point)
            self.witness.after_event()
            self.hangs.after_event()
            if deadline_s is None and not self.faults.active:
                deadline_s = self.clock.now_s + LIVENESS_S
            hangs = kind is None or self.clock.events > EVENTS_MAX
            hangs = hangs or (deadline_s is not None and self.clock.now_s > deadline_s)
            state = self.agent.machine.state.value
            self.witness.require(not hangs, f"faults have stopped and the job is {state} for ever")

    def lines(self) -> list[str]:
        """Return the trace in words."""
        return [f"{at_s:9.4f} {kind:5} {_short(what)}" for at_s, kind, what in self.trace]


def _short(what: Any) -> str:
    text = str(what).replace("CheckpointId(generation=", "(g").replace(", step=", " s")
    return text if len(text) < 220 else text[:217] + "..."


def run(seed: int, options: Options | None = None) -> Node:
    """Run one simulation; raises `SimulationError` with what is needed to replay it."""
    options = Options.draw(seed) if options is None else options
    node = Node(seed, options)
    try:
        node.run()
    except Exception as problem:
        raise SimulationError(seed, options, problem, node.lines()) from problem
    return node
