"""Which checkpoints are healthy and which suspect."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.health import Health, told
from ckptd.types import CheckpointId
from tests.core.script import cid

# What happens at each step from 1 on: whether something is reported and what, then whether a snapshot is complete.
steps = st.lists(st.tuples(st.sampled_from(["good", "good", "good", "bad", ""]), st.booleans()), max_size=40)


def play(health: Health, course, generation: int = 1, after: int = 0) -> None:
    """Feed what happens at each step."""
    for step, (report, sealed) in enumerate(course, after + 1):
        if report:
            getattr(health, report)(step)
        if sealed:
            health.sealed(CheckpointId(generation, step))


def expected(course, healthy_after: int) -> tuple[set[int], set[int]]:
    """Work out from the whole course which snapshots are healthy and which suspect."""
    reports = [(step, report == "good") for step, (report, _) in enumerate(course, 1) if report]
    sealed = {step for step, (_, captured) in enumerate(course, 1) if captured}
    runs = [reports[at : at + healthy_after] for at in range(len(reports) - healthy_after + 1)]
    proofs = [run[0][0] for run in runs if all(good for _, good in run)]
    healthy = {step for step in sealed if any(step < proof for proof in proofs)}
    trouble, streak, last_good = None, 0, 0
    for step, good in reports:
        if good:
            streak, last_good = streak + 1, step if trouble is None else last_good
            if trouble is not None and streak >= healthy_after:
                trouble, last_good = None, step
        else:
            trouble, streak = (last_good if trouble is None else trouble), 0
    return healthy, {step for step in sealed if trouble is not None and step >= trouble}


@given(steps, st.integers(1, 4))
def test_every_course_is_judged_as_the_rule_says(course, healthy_after):
    """Proves both verdicts against the rule, worked out from the whole course at once instead of step by step."""
    health = Health(healthy_after)
    health.begin(1, None)
    play(health, course)
    healthy, suspect = expected(course, healthy_after)
    assert {item.step for item in health.healthy} == healthy
    assert {item.step for item in health.suspect} == suspect


@given(steps)
def test_nothing_is_both(course):
    """Proves that no checkpoint is healthy and suspect, and that what is best never is suspect."""
    health = Health(2)
    health.begin(1, None)
    play(health, course)
    assert not health.healthy & health.suspect
    everything = [CheckpointId(1, step) for step, (_, sealed) in enumerate(course, 1) if sealed]
    best = health.best(everything)
    assert best is None or best not in health.suspect
    if health.healthy:
        assert best == max(health.healthy)


@given(st.integers(2, 30), st.integers(1, 4), st.integers(0, 2), st.data())
def test_the_order_in_which_ranks_are_heard_does_not_matter(bad, ranks, beyond, data):
    """Proves that one bad step among the good ones of several ranks marks the same, however late whoever is heard."""
    health = Health(3)
    health.begin(1, None)
    for step in range(1, bad + beyond + 1):
        health.sealed(CheckpointId(1, step))
    culprit = data.draw(st.integers(0, ranks - 1))
    streams = [[(step, step != bad or rank != culprit) for step in range(1, bad + beyond + 1)] for rank in range(ranks)]
    while any(streams):
        stream = data.draw(st.sampled_from([item for item in streams if item]))
        step, good = stream.pop(0)
        (health.good if good else health.bad)(step)
    assert health.first_bad == bad
    assert health.since == bad - 1
    assert {item.step for item in health.suspect} == set(range(bad - 1, bad + beyond + 1))
    health.skip_bad()
    assert health.skipped == [(bad, bad)]


def test_what_a_generation_begins_with_is_judged_by_its_reports():
    """Proves that a suspect checkpoint which training goes on well from becomes healthy, with its ancestors."""
    health = Health(2)
    health.begin(1, None)
    play(health, [("good", True), ("bad", True)])
    assert health.suspect == {cid("g1/s1"), cid("g1/s2")}
    health.begin(2, cid("g1/s2"))
    play(health, [("good", False)], 2, after=2)
    assert health.suspect == {cid("g1/s1"), cid("g1/s2")}
    play(health, [("good", False)], 2, after=3)
    assert (health.suspect, health.healthy) == (set(), {cid("g1/s1"), cid("g1/s2")})


def test_a_bad_first_step_makes_what_it_began_with_suspect_unless_that_was_proved():
    """Proves the two cases of a generation whose first report is bad."""
    for reports, suspect in ((1, {"g1/s1"}), (2, set())):
        health = Health(2)
        health.begin(1, None)
        play(health, [("good", True), *[("good", False)] * reports])
        health.begin(2, cid("g1/s1"))
        health.bad(2)
        assert health.suspect == set(map(cid, suspect))


def test_skipped_ranges_join_and_are_told_from_where_training_begins():
    """Proves that ranges which touch become one, reach back to the last healthy step, and are told as far as needed."""
    health = Health(2)
    for bad, last_good in ((20, 9), (40, 39), (21, 19), (41, 39)):
        health.begin(1, None)
        health.good(last_good)
        health.bad(bad)
        health.skip_bad()
    assert health.skipped == [(10, 21), (40, 41)]
    assert health.skipped_after(0) == [(10, 21), (40, 41)]
    assert health.skipped_after(15) == [(16, 21), (40, 41)]
    assert health.skipped_after(40) == [(41, 41)]
    assert health.skipped_after(41) == []


@given(steps)
def test_it_survives_being_written_down(course):
    """Proves that the next agent knows what this one knew, from JSON, and forgets what is nowhere any more."""
    health, heir = Health(2), Health(2)
    health.begin(1, None)
    play(health, course)
    health.skip_bad()
    heir.recall(json.loads(json.dumps(health.to_json())))
    assert (heir.healthy, heir.suspect, heir.skipped) == (health.healthy, health.suspect, health.skipped)
    heir.resume(1, None, health.healthy | health.suspect)
    assert (heir.healthy, heir.suspect) == (health.healthy, health.suspect), "its generation goes on"
    assert set(heir.needed(health.healthy)) >= set(sorted(health.healthy)[-1:])
    heir.keep([])
    assert not heir.healthy | heir.suspect


@given(steps)
def test_what_was_proved_to_another_agent_is_not_doubted_again(course):
    """Proves that a bad step casts no doubt on what was healthy before, though this agent has heard of no good one."""
    health, heir = Health(2), Health(2)
    health.begin(1, None)
    play(health, course)
    heir.recall(health.to_json())
    heir.resume(1, None, ())
    for checkpoint in sorted(health.healthy):  # from the memory of ranks
        heir.returned(checkpoint)
    heir.bad(50)
    assert heir.healthy == health.healthy
    newest = max((item.step for item in health.healthy), default=-1)
    assert heir.since == newest + 1


def test_what_a_generation_began_with_stays_healthy_in_memory_alone():
    """Proves that what the generation of another agent began with is healthy to the next one, and where it began."""
    heir = Health(2)
    heir.recall({"healthy": [cid("g1/s10")._asdict()], "suspect": [], "afresh": True})
    heir.resume(2, cid("g1/s10"), ())
    heir.returned(cid("g1/s10"))
    heir.bad(11)
    assert (heir.healthy, heir.suspect, heir.afresh) == ({cid("g1/s10")}, set(), True)


def test_what_is_heard_before_the_checkpoints_are_known():
    """Proves that what comes back, or is found, after a report is judged by it as if it had been known before."""
    heir = Health(2)
    for step in (11, 12, 13):
        heir.good(step)
    heir.bad(14)
    heir.resume(1, None, [cid("g1/s10"), cid("g1/s12"), cid("g1/s15")])
    heir.returned(cid("g1/s11"))
    heir.returned(cid("g1/s16"))
    assert heir.healthy == {cid("g1/s10"), cid("g1/s11")}
    assert heir.suspect == {cid("g1/s15"), cid("g1/s16")}


@given(steps)
def test_manifests_tell_no_lie(course):
    """Proves that what the values of manifests tell of a course is right, as far as the newest of them can know."""
    health = Health(2)
    health.begin(1, None)
    manifests: dict[CheckpointId, dict[str, float]] = {}
    known: tuple[set[CheckpointId], set[CheckpointId]] = set(), set()
    for step, item in enumerate(course, 1):
        play(health, [item], after=step - 1)
        if item[1]:
            manifests[CheckpointId(1, step)] = health.notes()
            known = set(health.healthy), set(health.suspect)
    healthy, suspect = told(manifests)
    assert suspect == known[1]
    assert healthy == known[0]


def test_nothing_is_kept_for_a_job_that_reports_nothing():
    """Proves that retention hears nothing of health before any report has told something of a checkpoint."""
    health = Health(2)
    health.begin(1, None)
    health.sealed(cid("g1/s5"))
    assert health.needed([cid("g1/s5")]) == {}
    health.good(6)
    health.good(7)
    assert health.needed([cid("g1/s5")]) == {cid("g1/s5"): "the newest healthy one"}
