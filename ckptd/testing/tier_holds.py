"""The part of the suite of tiers that is about holds: one process at a time has a job."""

from __future__ import annotations

import subprocess
import threading

from ckptd.errors import FencedError, StoreError
from ckptd.storage.tier import Tier
from ckptd.testing.expecting import expecting, only_if
from ckptd.testing.working import keys_of

_SOON_S = 30.0
"""More than letting go of anything takes on a busy machine."""


class HoldTests:
    """What `TierSuite` asks of `hold`."""

    def reopen(self, tier: Tier) -> Tier | None:
        """Return another tier at the same place, that shares nothing in memory with `tier`; None if there is none."""
        del tier
        return None

    def holder(self, tier: Tier, job: str) -> subprocess.Popen[bytes] | None:
        """Start a process that holds `job` at the same place and does nothing more; None if no process can.

        It prints a line when it has it. The suite kills it.
        """
        del tier, job
        return None

    def test_does_not_pretend_to_hold(self, tier: Tier) -> None:
        """A tier that can't keep other processes out refuses a hold, instead of leaving them in."""
        only_if(not tier.capabilities.exclusive_hold, "the tier declares exclusive holds")
        with expecting(StoreError, "a hold was given"):
            tier.hold("job", 0.0)

    def test_a_hold_leaves_nothing(self, tier: Tier) -> None:
        """A hold is taken once however often it is asked for, is no object, outlives a sweep, and hinders no put."""
        only_if(tier.capabilities.exclusive_hold, "the tier declares no exclusive holds")
        for _ in range(2):
            tier.hold("job", 0.0)
        assert keys_of(tier, "") == set()
        assert list(tier.sweep("", 0.0)) == []
        tier.put("job/a", b"x")
        tier.delete("job/a")
        tier.close()

    def test_a_job_is_held_once(self, tier: Tier) -> None:
        """A second tier is refused until the first one closes, a sweep changes nothing, and other jobs are free."""
        other = self._other(tier)
        tier.hold("job", 0.0)
        list(other.sweep("", 0.0))
        with expecting(FencedError, "a held job was held again") as caught:
            other.hold("job", 0.1)
        assert "job" in caught.error.message
        other.hold("job-2", 0.0)
        other.put("job/a", b"whoever holds nothing may still write")
        assert tier.get("job/a") == b"whoever holds nothing may still write"
        tier.close()
        other.hold("job", 0.0)
        other.close()

    def test_a_hold_is_waited_for(self, tier: Tier) -> None:
        """Who comes while a job is held gets it when the holder lets go before the deadline."""
        other = self._other(tier)
        tier.hold("job", 0.0)
        closing = threading.Timer(0.3, tier.close)
        closing.start()
        other.hold("job", _SOON_S)
        closing.join()
        other.close()

    def test_a_killed_holder_lets_go(self, tier: Tier) -> None:
        """While another process has a job the error names it, and when it is killed the job is free."""
        only_if(tier.capabilities.exclusive_hold, "the tier declares no exclusive holds")
        holder = self.holder(tier, "job")
        only_if(holder is not None, "`holder` is not overridden")
        assert holder is not None
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline(), "the other process did not get the hold"
            with expecting(FencedError, "what another process holds was held") as caught:
                tier.hold("job", 0.1)
            assert str(holder.pid) in caught.error.message, "the error does not say who holds it"
        finally:
            holder.kill()
            holder.communicate()
        tier.hold("job", _SOON_S)
        tier.close()

    def _other(self, tier: Tier) -> Tier:
        only_if(tier.capabilities.exclusive_hold, "the tier declares no exclusive holds")
        other = self.reopen(tier)
        only_if(other is not None, "`reopen` is not overridden")
        assert other is not None
        return other
