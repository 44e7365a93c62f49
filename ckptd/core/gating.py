"""The health gate: no generation starts on a node that isn't fit for it; the job waits for that, and not for ever.

The look at the node runs beside what has to be waited for anyway, the reading of the store or the end of the old ranks,
so a fit node costs a restart nothing. Ranks that somebody else starts are not held up: they run already.
"""

from __future__ import annotations

from ckptd.core.events import Effect, Log
from ckptd.core.gate_events import CheckNode, NodeChecked
from ckptd.core.job_spec import JobSpec, Now
from ckptd.core.job_states import JobState
from ckptd.core.policy.gate import FRESH_S, decide
from ckptd.core.watching import Watching
from ckptd.errors import JobFailedError
from ckptd.types import Evidence

NOT_READY = "not ready"
_HINT = "mend that and run the same command again; CKPTD_PLUGINS_BLOCK leaves the plugin of a check out"


class Gating(Watching):
    """The part of a job between the decision to begin a generation and its beginning."""

    def __init__(self, spec: JobSpec, first_incident: int) -> None:
        super().__init__(spec, first_incident)
        self._looking = False
        self._held = False
        """Whether a plan waits for the node."""
        self._fit_at_s: float | None = None
        self._unfit_since_s: float | None = None
        self.node_refused = False
        """Whether the job has ended since its node was not fit, which may pass."""

    def begin(self) -> list[Effect]:
        """Start the job, and look at the node meanwhile."""
        return super().begin() + self._look_at_node()

    def _fail(self, evidence: Evidence, last_lines: tuple[str, ...], now: Now) -> list[Effect]:
        return super()._fail(evidence, last_lines, now) + self._look_at_node()

    def _look_at_node(self) -> list[Effect]:
        if self._looking or not self.spec.supervised:
            return []
        self._looking = True
        return [CheckNode()]

    def _plan(self, now: Now) -> list[Effect]:
        fit = self._fit_at_s is not None and now.s - self._fit_at_s <= FRESH_S
        if self.state is not JobState.PREPARING or not self.spec.supervised or (fit and not self._looking):
            return super()._plan(now)
        self._held = True
        return self._look_at_node()

    def _node_checked(self, event: NodeChecked, now: Now) -> list[Effect]:
        self._looking = False
        held, self._held = self._held and self.state is JobState.PREPARING, False
        if event.unfit and not held:
            return []  # it is looked at again when that matters
        since_s = now.s if self._unfit_since_s is None else self._unfit_since_s
        waited_s = now.s - since_s
        decision = decide(event.unfit, waited_s, self.spec.check_wait_s)
        if decision.action == "start":
            self._fit_at_s = now.s
            effects = self._ready_again(waited_s)
            return effects + super()._plan(now) if held else effects
        self._fit_at_s = None
        if decision.action == "refuse":
            return self._refuse(decision.verdict, decision.reasons, now)
        self._unfit_since_s, self._plan_at_s = since_s, now.s + decision.retry_s
        if not self.warnings.note(NOT_READY, None, decision.verdict, now.s):
            return []
        fields = {"reasons": list(decision.reasons), "retry_in_s": decision.retry_s, "wait_s": self.spec.check_wait_s}
        return [Log("node not ready", fields, level="error")]

    def _ready_again(self, waited_s: float) -> list[Effect]:
        if self._unfit_since_s is None:
            return []
        self._unfit_since_s = None
        reason = next((item.summary for item in self.warnings if item.kind == NOT_READY), "the node was not ready")
        self.warnings.clear(NOT_READY)
        return [
            Log("node ready", {"waited_s": round(waited_s, 3)}),
            *self.recovery.because(f"it waited {waited_s:.0f} s: {reason}"),
        ]

    def _refuse(self, verdict: str, reasons: tuple[str, ...], now: Now) -> list[Effect]:
        self._unfit_since_s, self.node_refused = None, True
        self.warnings.clear(NOT_READY)
        evidence = Evidence("gate", NOT_READY, None, 1.0, verdict, now.s, facts=reasons)
        effects = self.recovery.refused(
            evidence,
            reasons,
            generation=self._last_generation,
            step=0 if self.generation is None else self.generation.newest_step,
            now_s=now.s,
            now_wall=now.wall,
        )
        return effects + self._give_up(JobFailedError(verdict, hint=_HINT), now)
