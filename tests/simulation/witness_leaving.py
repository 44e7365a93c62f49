"""The part of the witness that looks at stops: whoever leaves on purpose has everything safe, or says what is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptd.core import events as e
from ckptd.core.job_states import JobState
from tests.simulation.storage import BUCKET, TIER

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent

_KILL_S = 5.0
"""After the grace, until ranks that do not end are killed."""
_SLACK_S = 2.0


class LeavingWitness:
    """What one life of an agent was told of its end, and what it said."""

    def __init__(self, agent: ModelAgent) -> None:
        self._agent = agent
        self._leave_by_s: float | None = None
        self._skipped: set[int] = set()
        """Of which steps it was said that they are not in the bucket."""
        self._scavenges = False
        self._captured = False
        self._given_up = False
        """Whether it was said that a snapshot is lost because somebody could not wait."""

    def before(self, event: e.Input) -> None:
        """Note when the job has to be gone."""
        if not isinstance(event, e.StopWanted):
            return
        until_s = self._agent.node.clock.now_s + event.grace_s
        self._leave_by_s = until_s if self._leave_by_s is None else min(self._leave_by_s, until_s)

    def said(self, log: e.Log) -> None:
        """Note what was said."""
        match log.event:
            case "stopping" if self._leave_by_s is None:  # nobody has asked for it at this moment
                self._leave_by_s = self._agent.node.clock.now_s + float(str(log.fields["grace_s"]))
            case "upload skipped" if log.fields.get("hint") and log.fields["tier"] == BUCKET:
                step = log.fields["step"]
                assert isinstance(step, int)
                self._skipped.add(step)
            case "scavenging":
                self._scavenges = True
            case "snapshot abandoned" if log.level == "error" and "nobody waits" in str(log.fields["reason"]):
                self._given_up = True
            case "leaving":
                self._captured = True
            case _:
                return

    def ended(self, end: e.End) -> None:
        """Check that what is newest is everywhere, or was said not to be; and that the grace was kept."""
        node = self._agent.node
        require, seen = node.witness.require, node.witness.seen
        if end.outcome != JobState.STOPPED.value or self._leave_by_s is None:
            return
        seen["left after a last capture"] += self._captured
        scavenge_s = self._agent.machine.spec.scavenge_s if self._scavenges else 0.0
        late_s = node.clock.now_s - self._leave_by_s
        require(late_s <= _KILL_S + scavenge_s + _SLACK_S, f"the job ends {late_s:.1f} s after its grace")
        lost = self._agent.machine.keeper.unflushed
        require(self._given_up or not lost, "a snapshot is lost, and nobody says so")
        seen["left at once"] += self._given_up
        there = node.witness.usable(node.disk.manifests.keys(), TIER)
        if not node.options.bucket or not there or node.witness.at_most is not None:
            return  # in the middle of a step back nobody knows which is the newest
        newest = max(there)
        arrived = newest in node.bucket.manifests
        seen["left with everything in the bucket"] += arrived
        seen["left behind, and said so"] += not arrived
        known = newest in self._agent.machine.keeper.tiers.held[TIER]
        said = arrived or not known or newest.step in self._skipped
        require(said, f"{newest} is not in the bucket, and nobody says so")
