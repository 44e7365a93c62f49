"""The queue of one further tier: newest first, bounded, patient with a tier that is down, and never in the way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.uploads import FINAL_UPLOAD_TRIES, Uploads
from tests.core.script import cid


def queue(*texts: str, backlog: int = 2, every_s: float = 0.0) -> Uploads:
    """Return a queue to which checkpoints were offered in that order."""
    made = Uploads("bucket", backlog, every_s)
    for text in texts:
        made.offer(cid(text))
    return made


def begin(uploads: Uploads, now_s: float = 0.0):
    """Begin what is due, and return it as it is printed."""
    checkpoint = uploads.next(now_s)
    if checkpoint is not None:
        uploads.begun(checkpoint, now_s)
    return None if checkpoint is None else str(checkpoint)


def test_one_at_a_time_and_the_newest_first():
    """Proves the order, and that nothing begins while another one is under way."""
    uploads = queue("g1/s10", "g1/s20")
    assert begin(uploads) == "g1/s20"
    assert begin(uploads) is None
    uploads.done(cid("g1/s20"))
    assert begin(uploads) == "g1/s10"


def test_the_backlog_is_bounded_and_says_what_it_drops():
    """Proves that a third one that waits drops the oldest, and that the same one is not queued twice."""
    uploads = queue("g1/s10")
    begin(uploads)
    assert uploads.offer(cid("g1/s20")) == uploads.offer(cid("g1/s30")) == uploads.offer(cid("g1/s30")) == []
    assert uploads.offer(cid("g1/s40")) == [cid("g1/s20")]
    assert uploads.pinned == {cid("g1/s10"), cid("g1/s30"), cid("g1/s40")}


def test_a_failure_is_tried_again_with_a_growing_delay():
    """Proves delays of 1, 2, 4 s up to a minute, whatever the number of failures, and that success ends them."""
    uploads, now_s, delays = queue("g1/s10"), 0.0, []
    for _ in range(1100):
        assert begin(uploads, now_s) == "g1/s10"
        delays.append(uploads.failed(cid("g1/s10"), now_s, retryable=True))
        assert uploads.next(now_s + delays[-1] - 0.01) is None
        now_s += delays[-1]
    assert delays[:7] == [1, 2, 4, 8, 16, 32, 60]
    assert set(delays[7:]) == {60}
    begin(uploads, now_s)
    uploads.done(cid("g1/s10"))
    uploads.offer(cid("g1/s20"))
    assert begin(uploads, now_s) == "g1/s20"
    assert uploads.failed(cid("g1/s20"), now_s, retryable=True) == 1


def test_a_newer_one_replaces_one_that_failed():
    """Proves that it takes the place of what waits for another try or comes back to find it, and waits as long."""
    uploads = queue("g1/s10")
    begin(uploads)
    uploads.failed(cid("g1/s10"), 0.0, retryable=True)
    assert uploads.offer(cid("g1/s20")) == [cid("g1/s10")]
    assert begin(uploads, 0.9) is None
    assert begin(uploads, 1.0) == "g1/s20"
    uploads.offer(cid("g1/s30"))
    assert uploads.failed(cid("g1/s20"), 1.0, retryable=True) is None
    assert uploads.pinned == {cid("g1/s30")}


def test_what_no_retry_cures_is_not_tried_again_but_the_next_one_is():
    """Proves that a refusal costs one checkpoint, and that it is hopeless until something newer or the same comes."""
    uploads = queue("g1/s10")
    begin(uploads)
    assert uploads.failed(cid("g1/s10"), 0.0, retryable=False) is None
    assert uploads.hopeless
    assert not uploads.pending
    uploads.offer(cid("g1/s10"))
    assert uploads.pending
    assert begin(uploads, 1.0) == "g1/s10"
    uploads.failed(cid("g1/s10"), 1.0, retryable=False)
    uploads.offer(cid("g1/s20"))
    assert uploads.pending
    assert begin(uploads, 5.0) == "g1/s20"


def test_the_newest_is_hopeless_after_its_last_try():
    """Proves that an ending job stops waiting after so many failures of the newest, and not of older ones."""
    uploads = queue("g1/s10")
    for attempt in range(FINAL_UPLOAD_TRIES):
        assert not uploads.hopeless
        begin(uploads, 100.0 * attempt)
        uploads.failed(cid("g1/s10"), 100.0 * attempt, retryable=True)
    assert uploads.hopeless
    uploads.offer(cid("g1/s20"))
    assert not uploads.hopeless


def test_a_tier_that_is_somebody_else_s_gets_nothing_more():
    """Proves that a closed queue takes nothing in, pins nothing, and is hopeless once something should be there."""
    uploads = queue("g1/s10", "g1/s20")
    begin(uploads)
    uploads.close()
    uploads.failed(cid("g1/s20"), 0.0, retryable=False)
    assert uploads.offer(cid("g1/s30")) == []
    assert begin(uploads, 1000.0) is None
    assert uploads.pinned == frozenset()
    assert uploads.hopeless


def test_an_interval_lets_only_the_newest_wait():
    """Proves that uploads begin no more often than asked for, and then with the newest."""
    uploads = queue("g1/s10", every_s=60.0)
    assert begin(uploads, 0.0) == "g1/s10"
    uploads.done(cid("g1/s10"))
    assert uploads.offer(cid("g1/s20")) == []
    assert uploads.offer(cid("g1/s30")) == [cid("g1/s20")]
    assert begin(uploads, 59.0) is None
    assert begin(uploads, 60.0) == "g1/s30"


def test_an_ending_job_does_not_wait_for_interval_or_delay():
    """Proves that the last checkpoint goes at once, that its next try waits, and that a job going on is calm again."""
    uploads = queue("g1/s10", every_s=60.0)
    begin(uploads, 0.0)
    uploads.done(cid("g1/s10"))
    uploads.offer(cid("g1/s20"))
    uploads.hurry(1.0)
    assert begin(uploads, 1.0) == "g1/s20"
    uploads.failed(cid("g1/s20"), 1.0, retryable=True)
    uploads.hurry(1.5)
    assert begin(uploads, 1.5) is None
    assert begin(uploads, 2.0) == "g1/s20"
    uploads.done(cid("g1/s20"))
    uploads.calm_down()
    uploads.offer(cid("g1/s30"))
    assert begin(uploads, 3.0) is None


def test_what_a_step_back_leaves_behind_does_not_go():
    """Proves that it neither waits, nor comes back from a failure, nor counts as what is still to come."""
    uploads = queue("g1/s10", "g1/s20")
    begin(uploads)
    uploads.offer(cid("g1/s30"))
    uploads.leave_behind(cid("g1/s10"))
    assert uploads.pinned == {cid("g1/s10"), cid("g1/s20")}
    assert uploads.failed(cid("g1/s20"), 0.0, retryable=True) is None
    assert uploads.pending
    assert begin(uploads, 9.0) == "g1/s10"
    uploads.done(cid("g1/s10"))
    assert not uploads.pending


def test_a_skipped_one_is_not_waited_for():
    """Proves that what would not be kept anyway holds nothing up."""
    uploads = queue("g1/s10")
    uploads.skip(cid("g1/s10"))
    assert not uploads.pending
    assert uploads.pinned == frozenset()


def test_an_older_one_that_is_lost_after_the_newest_is_not_waited_for():
    """Proves that the loss of the newest stays known when older ones are lost after it: an ending job would wait."""
    uploads = Uploads("bucket", 2, 0.0)
    uploads.offer(cid("g1/s10"))
    uploads.offer(cid("g1/s20"))
    for step, now_s in ((20, 0.0), (10, 60.0)):
        uploads.begun(cid(f"g1/s{step}"), now_s)
        uploads.failed(cid(f"g1/s{step}"), now_s, retryable=False)
    assert uploads.hopeless
    assert not uploads.pending


steps = st.lists(
    st.tuples(st.sampled_from(["offer", "begin", "done", "retry", "lose", "trim", "back", "wait"]), st.integers(1, 9)),
    max_size=60,
)


@given(steps, st.integers(1, 3), st.sampled_from([0.0, 3.0]))
def test_whatever_happens_the_newest_arrives_or_is_hopeless(events, backlog, every_s):
    """Proves the bound on what waits, and that once failures end the newest that was offered comes to the tier."""
    uploads, now_s, running, step, arrived = Uploads("bucket", backlog, every_s), 0.0, None, 10, set()
    for what, number in events:
        if what == "offer":
            step += 10
            uploads.offer(cid(f"g1/s{step}"))
        elif what == "back":
            uploads.leave_behind(cid(f"g1/s{step}"))
        elif what == "wait":
            now_s += number
        elif what == "trim":
            uploads.trim()
        elif what == "begin" and running is None:
            running = uploads.next(now_s)
            if running is not None:
                uploads.begun(running, now_s)
        elif running is not None and what in ("done", "retry", "lose"):
            if what == "done":
                uploads.done(running)
                arrived.add(running)
            else:
                uploads.failed(running, now_s, retryable=what == "retry")
                uploads.trim()
            running = None
        assert uploads.busy == (running is not None)
        assert len(uploads.pinned) <= backlog + 2
    if running is not None:
        uploads.done(running)
        arrived.add(running)
    while uploads.pending:
        now_s += 60.0
        running = uploads.next(now_s)
        assert running is not None
        uploads.begun(running, now_s)
        uploads.done(running)
        arrived.add(running)
    assert step == 10 or uploads.hopeless or cid(f"g1/s{step}") in arrived
