"""What may go wrong: exactly what the design promises to survive, so that every failure is a bug.

The list, and what each leaves intact:
- any rank, several ranks, the launcher, or the agent is killed, at any event and between any two effects;
- a rank stands still, for a while or for ever, at any moment until it has left its training;
- the agent of a service is killed, and its ranks and launcher train on until another agent takes them over;
- a write to the disk fails, or is torn because the agent dies;
- a stored file is damaged or cut short while another intact checkpoint of the lineage stays behind: a rank finds it,
  or a scrub, and it is mended where there is a bucket that has it; on a disk that is full at times, no newest one;
- a snapshot in memory that is committed already is damaged, while its copy on the disk is intact;
- the bucket is down or slow for a while, or refuses a request;
- the node is lost with its disk, where there is a bucket;
- an operator asks for a checkpoint, a restart, a step back or a stop at any moment, or for a stop to come.

Not in it: all copies damaged at once, or any where a NaN may leave but one of them healthy, or the newest unnoticed
while a full disk costs the one before it; bytes that several checkpoints share among them, damage of what no digest was
taken of yet, and a launcher that is killed before its imports are done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptd.core import events as e
from ckptd.core.halt_events import HaltWanted
from ckptd.core.job_states import JobState
from ckptd.core.policy.halt import Conditions
from ckptd.core.restore import MEMORY

if TYPE_CHECKING:
    from tests.simulation.node import Node

_RARE = {"tick": 0.2, "rank": 0.5}
"""Kinds of events that are so frequent that a fault there is made less likely."""


class Faults:
    """Injects the faults of one run. Once the budget is used up, or time is, nothing goes wrong any more."""

    def __init__(self, node: Node) -> None:
        options = node.options
        self._node = node
        self._left = options.faults
        self._end_s = options.total_steps * options.step_s * 3 + 20
        kinds = [kind for kind in options.fault_kinds if options.supervised or kind in _ATTACHED]
        self._kinds = [kind for kind in kinds if options.bucket or kind not in _WITH_BUCKET]

    @property
    def active(self) -> bool:
        """Whether anything may still go wrong."""
        return (self._left > 0 or self._node.options.write_error_chance > 0) and self._node.clock.now_s < self._end_s

    @property
    def writes_may_fail(self) -> bool:
        """Whether the disk may refuse writes."""
        return self._node.clock.now_s < self._end_s

    def point(self, kind: str) -> None:
        """Inject a fault here, perhaps."""
        node = self._node
        if self._left <= 0 or node.clock.now_s >= self._end_s or not node.agent.alive:
            return
        if kind == "bucket":
            if node.bucket.rng.random() >= node.options.bucket_fault_chance:
                return
        elif node.rng.random() >= node.options.fault_chance * _RARE.get(kind, 1.0):
            return
        fault = node.rng.choice(self._kinds)
        if self._inject(fault):
            self._left -= 1
            node.witness.seen[f"{fault} between two effects" if kind == "effect" else fault] += 1

    def _inject(self, kind: str) -> bool:
        match kind:
            case "rank":
                return self._kill_ranks(1)
            case "ranks":
                return self._kill_ranks(2)
            case "hang":
                return self._hang_rank()
            case "launcher":
                return self._kill_launcher()
            case "takeover":
                self._node.lose_agent()
                return True
            case "agent":
                self._node.kill_agent()
                return True
            case "disk lost":
                self._node.lose_disk()
                return True
            case "bucket down" | "bucket slow":
                return self._trouble_bucket(down=kind == "bucket down")
            case "damage":
                return self._damage_shard()
            case "memory":
                return self._damage_memory()
            case "step back":
                return self._step_back()
            case "stop":
                return self._stop()
            case "halt":
                return self._halt()
        wish = e.CheckpointWanted() if kind == "checkpoint" else e.RestartWanted()
        self._node.note("fault", wish)
        self._node.agent.feed(wish)
        return True

    def _kill_ranks(self, number: int) -> bool:
        node = self._node
        holder = node.foreign if node.foreign is not None else node.agent.launcher
        living = [] if holder is None else [rank for rank in holder.ranks.values() if rank.alive]
        for process in node.rng.sample(living, min(number, len(living))):
            node.note("fault", f"{process} is killed")
            process.kill(9)
        return bool(living)

    def _hang_rank(self) -> bool:
        node = self._node
        there = [rank for rank in node.agent.ranks.values() if rank.alive and not rank.stuck]
        there = [rank for rank in there if rank.page is not None and rank.page.phase != "left"]
        if not there:
            return False
        process, seconds = node.rng.choice(there), node.rng.choice((1.0, 8.0, 1e9)) * node.rng.random()
        node.note("fault", f"{process} hangs for {seconds:.1f} s")
        process.hang(seconds)
        return True

    def _kill_launcher(self) -> bool:
        launcher = self._node.agent.launcher
        if launcher is None or not launcher.alive or not launcher.reported:
            return False
        self._node.note("fault", "the launcher is killed")
        launcher.die()
        return True

    def _trouble_bucket(self, *, down: bool) -> bool:
        node, rng = self._node, self._node.bucket.rng
        until_s = min(self._end_s, node.clock.now_s + rng.choice((1.0, 5.0, 60.0)) * rng.random())
        node.note("fault", f"the bucket is {'down' if down else 'slow'} until {until_s:.2f}")
        if down:
            node.bucket.down_until_s = until_s
        else:
            node.bucket.slow_until_s = until_s
        return True

    def _damage_shard(self) -> bool:
        node = self._node
        safe = [item for item in node.witness.intact if item not in node.witness.leaving]
        if len(safe) < 2 or node.options.nan_at or node.witness.at_most is not None or node.witness.commit_unknown:
            return False
        # On a disk that may be full the older one goes for room, before anybody has read the newest: see above.
        target = node.rng.choice(safe[-2:-1] if node.options.disk_files else safe[-2:])
        cut = node.rng.random() < 0.4
        node.note("fault", f"a shard of {target} is {'cut short' if cut else 'damaged'}")
        node.disk.damage(target, node.rng.randrange(node.options.world_size), cut=cut)
        if node.rng.random() < 0.5:
            node.kill_agent()  # so that somebody has to read it
        return True

    def _damage_memory(self) -> bool:
        node, witness = self._node, self._node.witness
        in_memory = witness.usable(witness.memory, MEMORY)
        safe = [item for item in witness.intact if item not in witness.leaving]
        if not in_memory or in_memory[-1] not in safe or witness.at_most is not None or witness.commit_unknown:
            return False
        newest, offer = in_memory[-1], node.agent.offer
        undigested = offer is not None and offer.source.id == newest and not offer.digested
        if newest not in node.agent.known_digests or undigested:
            return False
        node.note("fault", f"the slots of {newest} are damaged")
        slot = node.rng.choice(witness.memory[newest])
        slot.cells[0] = None
        slot.flipped = True
        if node.rng.random() < 0.5:
            self._kill_ranks(1)
        return True

    def _step_back(self) -> bool:
        node, witness = self._node, self._node.witness
        targets = [item for item in witness.intact if item not in witness.leaving]
        if not targets or witness.at_most is not None:
            return False
        target = node.rng.choice(targets)
        node.note("fault", f"a restart from at most step {target.step} is asked for")
        node.agent.feed(e.RestartWanted(target.step))
        return True

    def _stop(self) -> bool:
        node = self._node
        if node.agent.machine.state is JobState.PENDING:
            return False
        node.stop_ordered = True
        wish = e.StopWanted(node.rng.choice((0.5, 5.0, 20.0)), checkpoint=node.rng.random() < 0.8)
        node.note("fault", wish)
        node.agent.feed(wish)
        return True

    def _halt(self) -> bool:
        node, rng = self._node, self._node.rng
        if node.agent.machine.state is JobState.PENDING:
            return False
        step = max((rank.step for rank in node.agent.ranks.values()), default=0)
        conditions = rng.choice((
            Conditions(after_step=step + rng.randint(0, 20)),
            Conditions(at=node.agent.now().wall + rng.uniform(0.0, 5.0)),
            Conditions(at_next_checkpoint=True),
        ))  # fmt: skip
        node.stop_ordered = True
        node.note("fault", conditions)
        node.agent.feed(HaltWanted(conditions))
        return True


_WITH_BUCKET = frozenset({"bucket down", "bucket slow", "disk lost"})
_ATTACHED = frozenset({"rank", "ranks", "hang", "agent", "takeover", "damage", "memory", "checkpoint", *_WITH_BUCKET})
