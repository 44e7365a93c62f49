"""What a job's machine is told of the job: its settings, in the words of `core`."""

from __future__ import annotations

from collections.abc import Sequence

from ckptd.config import JobConfig
from ckptd.core.job_spec import JobSpec
from ckptd.core.policy.restart import RestartPolicy
from ckptd.core.policy.straggler import StragglerPolicy
from ckptd.daemon import leaving
from ckptd.daemon.tiers import spec_of
from ckptd.daemon.watching import policy_of
from ckptd.tiers import JobTier


def job_spec(config: JobConfig, tiers: Sequence[JobTier]) -> JobSpec:
    """Return what the machine needs to know of a job."""
    return JobSpec(
        config.name,
        config.nproc,
        config.every_s,
        supervised=config.supervised,
        slots=config.slots,
        tiers=tuple(map(spec_of, tiers)),
        restart=RestartPolicy(config.max_restarts, config.restart_window_s),
        numbers=config.numbers,
        hang=policy_of(config.hang),
        straggler=StragglerPolicy(config.straggler.factor, config.straggler.restart),
        halt=leaving.policy_of(config.halt),
        return_s=config.agent_wait_s,
        check_wait_s=config.check_wait_s,
    )
