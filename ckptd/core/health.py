"""Which checkpoints training went on well from, as far as what ranks report of later steps can tell.

A report of step n says what the weights after step n - 1 are worth. So a checkpoint of step S becomes *healthy* with
the K-th healthy step beyond S, and one that is neither is not known yet. A bad report at step n makes every checkpoint
*suspect* that is at or beyond the last step reported healthy before n: nothing has proved the weights after that step.
They stay suspect, and new ones are, until K healthy steps have followed the last bad one: then training has gone on
well from all of them, and what harm there was has passed. What was healthy when a generation began with it stays so.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ckptd.types import CheckpointId

_STEPS_KEPT = 1024
_RANGES_KEPT = 1000
OWN = "ckptd."
SUSPECT_SINCE = f"{OWN}suspect_since"
HEALTHY_GENERATION = f"{OWN}healthy_generation"
HEALTHY_STEP = f"{OWN}healthy_step"
"""Under these names the values of a manifest say what was known at its commit, for who has nothing else to go by."""


class Health:
    """What is known of the checkpoints of one job, and which of its steps were bad."""

    _HEALTHY = "the newest healthy one"

    def __init__(self, healthy_after: int = 3) -> None:
        """Call a checkpoint healthy when so many steps after it were."""
        self.healthy: set[CheckpointId] = set()
        self.suspect: set[CheckpointId] = set()
        self.skipped: list[tuple[int, int]] = []
        """The ranges of steps, first and last, that were bad when the job stepped back, in order and apart."""
        self.afresh = False
        """Whether the job was seen to begin with nothing, and has nothing healthy since: its beginning is not far."""
        self.first_bad: int | None = None
        """The first bad step of the present trouble, None while all is well."""
        self._healthy_after = healthy_after
        self._line: set[CheckpointId] = set()
        """What the present generation descends from, and its own."""
        self._open: set[CheckpointId] = set()
        """Of these the ones of which reports to come can tell something."""
        self._doubted: set[CheckpointId] = set()
        """What the present trouble has made suspect."""
        self._generation = 0
        self._began_at = 0
        self._last_bad = 0
        self._steps: list[int] = []
        """Steps of this generation that were reported healthy, in order; during trouble none between its bad ones."""

    # --- what happens -----------------------------------------------------------------------------------------

    def read(self, line: Iterable[CheckpointId]) -> None:
        """Note what a restart could begin with."""
        self._line = set(line)
        self._open = self._line - self.healthy

    def resume(self, generation: int, parent: CheckpointId | None, line: Iterable[CheckpointId]) -> None:
        """Go on with a generation that another agent has begun: what it has written down of `line` holds.

        Of what was reported to that one no more is known than that a step after the newest healthy checkpoint was good.
        """
        self.read(line)
        self._generation, self._began_at = generation, 0 if parent is None else parent.step
        proven = max((item.step + 1 for item in self.healthy if item.generation == generation), default=0)
        if proven and (self.first_bad is None or proven < self.first_bad):
            self._steps = sorted({*self._steps, proven})
        self._doubt()
        self._prove()

    def returned(self, checkpoint: CheckpointId) -> None:
        """Note a complete snapshot that its ranks have brought to another agent: what is written down of it holds."""
        self._line.add(checkpoint)
        if checkpoint not in self.healthy:
            self._open.add(checkpoint)
        self._doubt()
        self._prove()

    def begin(self, generation: int, parent: CheckpointId | None) -> None:
        """Begin a generation: what is newer than `parent` is none of its past."""
        self.read(item for item in {*self._line, parent} if item is not None and parent is not None and item <= parent)
        self.healthy &= self._line
        self.afresh = self.afresh or parent is None
        self._generation, self._began_at = generation, 0 if parent is None else parent.step
        self.first_bad, self._steps, self._doubted = None, [], set()

    def sealed(self, checkpoint: CheckpointId) -> bool:
        """Note a complete snapshot of the present generation; return whether anything is known now that was not."""
        if checkpoint in self._line:
            return False
        self._line.add(checkpoint)
        self._open.add(checkpoint)
        self.afresh = self.afresh and (bool(self._steps) or self.first_bad is not None)
        if self.first_bad is not None and checkpoint.step >= self.since:
            self.suspect.add(checkpoint)
            self._doubted.add(checkpoint)
            return True
        return self._prove()

    def good(self, step: int) -> bool:
        """Note a healthy report; return whether anything is known now that was not."""
        at = bisect_left(self._steps, step)
        within_trouble = self.first_bad is not None and self.first_bad <= step <= self._last_bad
        if within_trouble or (at < len(self._steps) and self._steps[at] == step):
            return False
        insort(self._steps, step)
        del self._steps[:-_STEPS_KEPT]
        if self.first_bad is not None:
            after = len(self._steps) - bisect_left(self._steps, self._last_bad)
            if after < self._healthy_after:
                cleared = {item for item in self._doubted if item.step < self.since}  # by a rank that was behind
                self.suspect -= cleared
                self._doubted -= cleared
                return self._prove() or bool(cleared)
            self.first_bad = None
            self.suspect -= self._open
            self._doubted = set()
            self._prove()
            return True
        return self._prove()

    def bad(self, step: int) -> bool:
        """Note a bad report; return whether anything is known now that was not."""
        before = self.first_bad
        self._last_bad = step if before is None else max(step, self._last_bad)
        self.first_bad = step if before is None else min(step, before)
        self._steps = [item for item in self._steps if item < self.first_bad or item > self._last_bad]
        if self.first_bad == before:
            return False
        self._doubt()
        return True

    def _doubt(self) -> None:
        """Call suspect what the present trouble, if there is one, may have spoilt."""
        if self.first_bad is None:
            return
        doubtful = {item for item in self._line if item.generation == self._generation} | self._open
        doubtful = {item for item in doubtful if item.step >= self.since}
        self._open |= doubtful
        self.healthy -= doubtful
        self.suspect |= doubtful
        self._doubted |= doubtful

    def _prove(self) -> bool:
        """Call healthy what enough healthy steps have followed; of those beyond a bad one only when that has passed."""
        at = len(self._steps) if self.first_bad is None else bisect_left(self._steps, self.first_bad)
        if at < self._healthy_after:
            return False
        limit = self._steps[at - self._healthy_after]
        proven = {item for item in self._open if item.step < limit}
        self.healthy |= proven
        self.suspect -= proven
        self._open -= proven
        self.afresh = self.afresh and not proven
        return bool(proven)

    @property
    def since(self) -> int:
        """The last step that was healthy before the present trouble; where the generation began if none was."""
        at = bisect_left(self._steps, self.first_bad or 0)
        return self._steps[at - 1] if at else self._began_at

    def skip_bad(self) -> None:
        """Have the bad steps of the present trouble skipped from now on: up to the first bad one since a healthy one.

        Which of them is to blame nobody can tell. What was bad beyond that came after, and may be well without it.
        """
        if self.first_bad is None:
            return
        first, last = min(self.since + 1, self.first_bad), self.first_bad
        apart = [item for item in self.skipped if item[1] + 1 < first or last + 1 < item[0]]
        touching = [item for item in self.skipped if item not in apart]
        joined = min([first, *(item[0] for item in touching)]), max([last, *(item[1] for item in touching)])
        self.skipped = sorted([*apart, joined])[-_RANGES_KEPT:]

    def was_skipped(self, step: int) -> bool:
        """Tell whether a step was to be skipped."""
        return any(first <= step <= last for first, last in self.skipped)

    def skipped_after(self, step: int) -> list[tuple[int, int]]:
        """Return what of the skipped ranges is still to come after a step."""
        return [(max(first, step + 1), last) for first, last in self.skipped if last > step]

    # --- what follows -----------------------------------------------------------------------------------------

    def best(self, checkpoints: Iterable[CheckpointId]) -> CheckpointId | None:
        """Return the newest healthy one; where none is known to be, the newest that is not suspect, if there is one."""
        newest_first = sorted(self._line.intersection(checkpoints), reverse=True)
        healthy = (item for item in newest_first if item in self.healthy)
        return next(healthy, next((item for item in newest_first if item not in self.suspect), None))

    def needed(self, checkpoints: Iterable[CheckpointId]) -> dict[CheckpointId, str]:
        """Return which of a tier's checkpoints must stay there, and why, for a step back now and for later ones.

        That is the newest healthy one, and of those after it the first that may prove healthy: if each went before it
        has, the newest healthy one would grow old. None while no report has told anything.
        """
        if not (self.healthy or self.suspect or self._steps):
            return {}
        held = sorted(self._line.intersection(checkpoints))
        healthy = [item for item in held if item in self.healthy][-1:]
        after = [item for item in held if not healthy or item > healthy[0]]
        hopeful = [item for item in after if item not in self.suspect][:1]
        return dict.fromkeys(hopeful, "the next that may prove healthy") | dict.fromkeys(healthy, self._HEALTHY)

    def why(self, best: CheckpointId) -> str:
        """Say why a checkpoint is the best one to step back to."""
        return self._HEALTHY if best in self.healthy else "the newest that is not suspect"

    def notes(self) -> dict[str, float]:
        """Return what a manifest that is committed now says of this, among its values."""
        found: dict[str, float] = {}
        newest = max(self.healthy & self._line, default=None)
        if newest is not None:
            found |= {HEALTHY_GENERATION: float(newest.generation), HEALTHY_STEP: float(newest.step)}
        if self.first_bad is not None:
            found[SUSPECT_SINCE] = float(self.since)
        return found

    def keep(self, checkpoints: Collection[CheckpointId]) -> None:
        """Forget what is nowhere any more: a job that begins afresh gives the same names again."""
        for known in (self.healthy, self.suspect, self._line, self._open):
            known.intersection_update(checkpoints)

    # --- written down -----------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Return what the next agent has to know, as `ckptctl status --json` shows it."""
        return {
            "healthy": [item._asdict() for item in sorted(self.healthy)],
            "suspect": [item._asdict() for item in sorted(self.suspect)],
            "skipped": [list(item) for item in self.skipped],
            "afresh": self.afresh,
        }

    def recall(self, data: Mapping[str, Any]) -> None:
        """Take over what an agent before has written down."""
        self.healthy, self.suspect = (
            {CheckpointId(int(item["generation"]), int(item["step"])) for item in data.get(key, ())}
            for key in ("healthy", "suspect")
        )
        self.skipped = [(int(first), int(last)) for first, last in data.get("skipped", ())]
        self.afresh = bool(data.get("afresh"))


def told(manifests: Mapping[CheckpointId, Mapping[str, float]]) -> tuple[set[CheckpointId], set[CheckpointId]]:
    """Return which checkpoints are healthy and which suspect, as far as the values of manifests tell.

    What the newest manifest of a generation says holds for that generation. What a healthy checkpoint has come of is
    healthy, whether that is still there or not.
    """
    newest: dict[int, CheckpointId] = {}
    proven: dict[int, int] = {}
    for checkpoint, values in manifests.items():
        newest[checkpoint.generation] = max(checkpoint, newest.get(checkpoint.generation, checkpoint))
        if HEALTHY_STEP in values and HEALTHY_GENERATION in values:
            generation, step = int(values[HEALTHY_GENERATION]), int(values[HEALTHY_STEP])
            proven[generation] = max(step, proven.get(generation, 0))
    since = {item.generation: manifests[item].get(SUSPECT_SINCE) for item in newest.values()}
    suspect = {item for item in manifests if (at := since[item.generation]) is not None and item.step >= at}
    healthy = {item for item in manifests if item.step <= proven.get(item.generation, -1)}
    return healthy - suspect, suspect
