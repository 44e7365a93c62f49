"""An agent that dies while its ranks train on, and the next one, which takes over what is left of it.

What `daemon.adopting`, `daemon.attendance` and `daemon.processes` do about it, in virtual time; it decides nothing.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ckptd.core import events as e
from ckptd.core.adopt_events import HeldShard, RankReturned
from ckptd.core.handover import Handover
from ckptd.types import CheckpointId, Evidence

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent
    from tests.simulation.launchers import Launcher
    from tests.simulation.ranks import RankProcess

Account = tuple[int, bool, bool, tuple[int, ...], tuple[e.RankSealed, ...], tuple[int, ...], bool]
"""What a rank says that comes back: step, whether it has its state and made a step, slots, seals, others, whole."""


def remember(agent: ModelAgent) -> None:
    """Write down what the next agent needs, where one may take over."""
    if not agent.alive or "takeover" not in agent.node.options.fault_kinds:
        return
    agent.node.journal = agent.machine.handover()


def begin(agent: ModelAgent, journal: Handover) -> list[e.Effect]:
    """Take over what the journal says, in the form in which it is on the disk; the others come back by themselves."""
    node, handover = agent.node, Handover.from_json(json.loads(json.dumps(journal.to_json())))
    effects = agent.machine.adopt(handover, agent.now())
    pids = handover.pids if handover.has_ranks else {}
    if node.options.supervised:
        _find_launcher(agent, expected=handover.has_ranks)
    living = set() if node.foreign is None else {process.pid for process in node.foreign.processes if process.alive}
    for rank, pid in pids.items() if node.foreign is not None else ():
        agent.orphans[pid] = rank
        if pid not in living:
            node.clock.after(0.0, agent, "report", orphan_ended, agent, pid)
    return effects


def orphan_ended(agent: ModelAgent, pid: int) -> None:
    """See the end of a rank of another launcher that is not back yet."""
    rank = agent.orphans.pop(pid, None)
    if rank is not None:
        summary = f"rank {rank} ended while no agent was there"
        gone = Evidence("pidfd", "vanished", rank, 1.0, summary, agent.node.clock.now_s)
        agent.feed(e.RankExited(rank, pid, gone))


def _find_launcher(agent: ModelAgent, *, expected: bool) -> None:
    """Wait for the launcher of the agent before, when its ranks can go on; else end it, and start another one."""
    node = agent.node
    launcher = node.launcher
    assert launcher is not None
    agent.family = launcher
    if not expected:
        launcher.dissolve()
        agent.family = None
        agent.start_launcher()
    elif launcher.alive:
        node.clock.after(node.rng.uniform(0, 0.1), launcher, "launcher", launcher.return_to, agent)
    else:
        for process in launcher.ranks.values():
            if not process.alive:
                node.clock.after(0.0, agent, "report", agent.rank_exited, process, node.clock.now_s)
        node.clock.after(0.0, agent, "report", agent.launcher_died, launcher)


def launcher_returned(agent: ModelAgent, launcher: Launcher, ended: list[RankProcess], at_s: float) -> None:
    """Take a launcher in, and what it knows of its ranks."""
    if agent.family is not launcher:
        return
    generation = agent.machine.generation
    complete = len(launcher.ranks) == agent.node.options.world_size
    if generation is None or launcher.generation != generation.number or not complete:
        launcher.dissolve()
        agent.node.clock.after(0.0, agent, "report", agent.launcher_died, launcher)
        return
    agent.launcher = launcher
    for rank, process in launcher.ranks.items():
        if generation.pids.get(rank) != process.pid:
            agent.feed(e.RankSpawned(rank, process.pid))
    for process in ended:
        agent.rank_exited(process, at_s)


def account(process: RankProcess) -> Account:
    """Return what a rank says when it comes back."""
    page = process.page
    assert page is not None
    busy = [number for number in process.slots if not page.free(number)]
    sealed = tuple(process.seals[number] for number in busy if number in process.seals)
    unknown = tuple(number for number in busy if number not in process.seals)
    return process.step, process.restored, process.own_steps > 0, tuple(process.slots), sealed, unknown, page.whole


def rank_returned(agent: ModelAgent, process: RankProcess, said: Account) -> None:
    """Take a rank in, with its slots and its page."""
    step, restored, stepped, slots, sealed, unknown, whole = said
    generation = agent.machine.generation
    if not process.alive:
        return
    if generation is None or process.generation != generation.number:
        process.fenced()
        return
    mine = agent.arena.slots.setdefault(process.rank, {})
    mine.update(process.slots)
    assert process.page is not None
    process.page.release_lost(mine)
    process.page.announce(None, last=False)
    process.page.read_again()
    process.lent = slots
    agent.ranks[process.rank] = process
    agent.connections.add(process)
    agent.orphans.pop(process.pid, None)
    shards = tuple(
        HeldShard(
            item.slot, CheckpointId(process.generation, item.step), item.image_bytes, item.values, item.capture_s,
            item.final, item.witness,
        )
        for item in sealed
    )  # fmt: skip
    agent.feed(RankReturned(process.rank, process.pid, step, restored, stepped, slots, shards, unknown, whole))


def kill_orphans(agent: ModelAgent, number: int) -> None:
    """Kill ranks whose launcher is gone, or not back yet."""
    for process in [] if agent.family is None else agent.family.ranks.values():
        process.kill(number)


def end_orphan(agent: ModelAgent, rank: int) -> None:
    """Kill one rank of another launcher that is not back yet."""
    for process in [] if agent.node.foreign is None else agent.node.foreign.processes:
        if agent.orphans.get(process.pid) == rank:
            process.kill(9)
