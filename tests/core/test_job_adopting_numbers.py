"""What is known of the numbers that ranks report, and of the health of checkpoints, while a job is taken over."""

from __future__ import annotations

import math

from ckptd.core.number_events import Report, Reported
from tests.core.adoption import back, held, take_over
from tests.core.bucket import commit, train, with_bucket
from tests.core.script import Script, cid


def test_what_was_reported_meanwhile_is_written_down() -> None:
    """What reports say of snapshots that are known only later is written down before anything of these is flushed."""
    before = Script()
    before.begin_training()
    before.capture(10, 0)
    job, _ = take_over(before)
    bad = Report(9, math.nan)
    back(job, 0, 14, held(0, "g1/s10"))
    job.feed(Reported({0: [bad]}))
    back(job, 1, 14, held(0, "g1/s10"))
    job.store(last_generation=1)
    effects = [type(effect).__name__ for effect in job.effects]
    assert effects.index("Marked") < effects.index("Flush")
    assert job.machine.keeper.health.suspect == {cid("g1/s10")}


def test_an_upload_lets_nothing_go_before_it_is_known_what_is_healthy() -> None:
    """Retention in the bucket waits until the ranks are back, whose reports tell what must stay there."""
    before = train(with_bucket(keep_in_bucket=1))
    commit(before, 10, 0)
    before.uploaded("g1/s10")
    commit(before, 20, 1)
    job, _ = take_over(before)
    job.store("g1/s20", "g1/s10", bucket=["g1/s10"], last_generation=1)
    assert job.wait(0.1) == ["upload g1/s20 to bucket"]
    assert job.uploaded("g1/s20") == ["log checkpoint committed"]
