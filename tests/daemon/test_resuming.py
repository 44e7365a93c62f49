"""Jobs that begin with another job's checkpoint: a real agent and real ranks, on stores of this disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.config import JobConfig, Origin
from ckptd.core.events import StoreRead
from ckptd.core.restore import Source
from ckptd.daemon.resuming import Resuming
from ckptd.daemon.tiers import read
from ckptd.errors import DamagedError, StoreError
from ckptd.storage import catalog, copying, keys
from ckptd.storage.local import LocalTier
from ckptd.storage.tier import Data, Entry, Pace, Tier
from ckptd.store_config import StoreConfig
from ckptd.tiers import JobTier
from ckptd.types import CheckpointId
from tests.daemon.bytes_framework import contents
from tests.daemon.harness import PATIENCE_S, AgentThread, Node, PuppetError, until
from tests.storage.checkpoints import FILE, FIRST, JOB, KEY, LATER, Bucket, commit, fill, flip, good

SIZE = 50_000


def committed_steps(node: Node, job: str = "job") -> list[int]:
    """The steps of a job that are in the node's store, oldest first."""
    return [int(path.parent.name[1:]) for path in node.manifests(job)]


@pytest.fixture
def trained(node: Node, start_agent: Callable[..., AgentThread]) -> list[int]:
    """A job called "job" with one rank in the node's store, of which the agent is gone; its steps."""
    agent = start_agent()
    puppet = node.puppet()
    puppet.attach(SIZE)
    puppet.train_until(lambda: len(node.manifests()) >= 2, "two commits")
    puppet.kill()
    agent.close()
    return committed_steps(node)


def listing(folder: Path) -> list[tuple[str, int]]:
    """Every file below a folder, and when it was changed."""
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())


def test_a_job_begins_with_another_ones_checkpoint(
    node: Node, trained: list[int], start_agent: Callable[..., AgentThread]
) -> None:
    """A new job's ranks get another job's newest state, go on from its step, and the next start needs it no more."""
    before = listing(node.store / "job")
    options = {"job": "tuned", "store": str(node.folder / "new"), "resume_from": str(node.store / "job")}
    agent = start_agent()
    puppet = node.puppet(CKPTD_JOB="tuned")
    assert puppet.attach(SIZE, **options) == [2, trained[-1], "local"]
    assert puppet.data() == contents(trained[-1], SIZE)
    (resumed,) = agent.events("resumed")
    assert (resumed["source"], resumed["step"]) == (str(node.store / "job"), trained[-1])
    puppet.train_until(lambda: agent.committed("tuned") > trained[-1], "a commit of its own")
    puppet.kill()
    agent.close()
    new = sorted((node.folder / "new" / "tuned").glob("g*/s*/manifest.json"))
    assert json.loads(new[-1].read_text())["parent"] == {"generation": 1, "step": trained[-1]}
    assert listing(node.store / "job") == before

    again = start_agent()
    puppet = node.puppet(CKPTD_JOB="tuned")
    assert puppet.attach(SIZE, **options)[:2] == [3, int(new[-1].parent.name[1:])]
    assert again.events("resuming") == []
    (said,) = again.events("resume not needed")
    assert said["source"] == str(node.store / "job")


def test_a_step_and_another_number_of_ranks(
    node: Node, trained: list[int], start_agent: Callable[..., AgentThread]
) -> None:
    """A step can be named, and what one rank has captured is offered to two."""
    agent = start_agent()
    puppets = [node.puppet(rank, 2, CKPTD_JOB="tuned") for rank in range(2)]
    options = {"job": "tuned", "resume_from": str(node.store / "job"), "resume_step": trained[0]}
    for puppet in puppets:
        puppet.start_attach(SIZE, **options)
    with contextlib.suppress(PuppetError):  # the adapter for bytes knows no other number of ranks; the offer is all
        puppets[0].finish()
    (started,) = agent.events("generation started")
    assert (started["generation"], started["restore_step"], started["restore_world_size"]) == (2, trained[0], 1)


@pytest.mark.parametrize(
    ("origin", "step", "code", "says"),
    [
        (
            "store/nobody",
            None,
            "not_found",
            "there is no job nobody in {}/store to resume from (hint: jobs there: job)",
        ),
        ("nowhere/job", None, "not_found", "there is no job job in {}/nowhere to resume from (hint: jobs there: none)"),
        (
            "store/job",
            999999,
            "not_found",
            "job job has no checkpoint of step 999999 in {}/store (hint: newest steps: ",
        ),
    ],
)
def test_nothing_to_resume_from(
    node: Node, trained: list[int], start_agent: Callable[..., AgentThread], origin, step, code, says
) -> None:
    """A job that is not there, or has no such step, ends the start in one line: no rank begins afresh."""
    agent = start_agent()
    puppet = node.puppet(CKPTD_JOB="tuned")
    with pytest.raises(PuppetError) as refused:
        puppet.attach(SIZE, job="tuned", resume_from=str(node.folder / origin), resume_step=step)
    assert refused.value.code == code
    assert refused.value.message.startswith(says.format(node.folder))
    until(lambda: agent.status("tuned")["state"] == "failed", "the end of the job")
    assert node.manifests("tuned") == []
    assert not (node.folder / "nowhere").exists()


def test_an_environment_variable(node: Node, trained: list[int], agent: AgentThread) -> None:
    """`CKPTD_RESUME_FROM` does what the argument does."""
    puppet = node.puppet(CKPTD_JOB="tuned", CKPTD_RESUME_FROM=str(node.store / "job"))
    assert puppet.attach(SIZE)[:2] == [2, trained[-1]]


# --- without ranks ----------------------------------------------------------------------------------------------


class Begun:
    """A job on some tiers that resumes from another one, at its start."""

    def __init__(self, origin: Tier, *tiers: Tier, step: int | None = None) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.origin, self.opened = origin, 0
        self.tiers = [JobTier(f"t{number}", tier, StoreConfig(f"/{number}")) for number, tier in enumerate(tiers)]
        place = Origin("/there", JOB)
        config = JobConfig("tuned", (), (StoreConfig("/first"),), resume_from=place, resume_step=step)
        self.resuming = Resuming(config, self.tiers, place, self._open, lambda *event: self.told.append(event))

    def _open(self, url: str, options: Any) -> Tier:
        assert (url, options) == ("/there", {})
        self.opened += 1
        return self.origin

    def read(self) -> StoreRead:
        """Return what the job's tiers hold."""
        return read(self.tiers, "tuned")

    def bring(self) -> StoreRead:
        """Do what the start of the job does, and return what its tiers hold then."""
        asyncio.run(self.resuming.bring(self.read()))
        return self.read()

    def said(self, name: str) -> list[dict[str, Any]]:
        """Return what was told of one event."""
        return [fields for event, fields in self.told if event == name]


def test_the_newest_that_is_whole(tmp_path: Path) -> None:
    """When the newest is damaged there, the next older one is taken, and both facts are told."""
    origin = fill(Bucket())
    flip(origin, keys.shard_key(JOB, LATER, 0), 5000)
    job = Begun(origin, LocalTier(tmp_path))
    assert job.bring().sources == (Source(FIRST, "t0"),)
    (damaged,) = job.said("checkpoint damaged")
    assert (damaged["step"], damaged["tier"]) == (LATER.step, f"/there/{JOB}")
    assert "rank-00000" in damaged["error"]
    assert [fields["step"] for fields in job.said("resuming")] == [LATER.step, FIRST.step]
    assert [fields["step"] for fields in job.said("resumed")] == [FIRST.step]


def test_a_step_that_was_named_is_not_replaced(tmp_path: Path) -> None:
    """Who asks for a step gets that or an error that names what is wrong with it, and no older one."""
    origin = fill(Bucket())
    flip(origin, keys.shard_key(JOB, LATER, 0), 5000)
    job = Begun(origin, LocalTier(tmp_path), step=LATER.step)
    with pytest.raises(DamagedError, match=r"is whole: .*rank-00000") as caught:
        job.bring()
    assert caught.value.hint is not None
    assert f"ckptctl verify /there/{JOB} --all" in caught.value.hint
    assert job.read().sources == ()


def test_nothing_is_whole(tmp_path: Path) -> None:
    """When every checkpoint there is damaged, the job gets none of them and no fresh start."""
    origin = fill(Bucket())
    flip(origin, KEY, 40)
    flip(origin, keys.shard_key(JOB, LATER, 0), 5000)
    job = Begun(origin, LocalTier(tmp_path))
    with pytest.raises(DamagedError):
        job.bring()
    assert len(job.said("checkpoint damaged")) == 2
    assert job.read().sources == ()


def test_a_lineage_is_followed_there(tmp_path: Path) -> None:
    """What a step back has left behind there is not what a job resumes from."""
    origin = fill(Bucket())
    catalog.claim_generation(origin, JOB, 2, FIRST, 1.0)
    assert Begun(origin, LocalTier(tmp_path)).bring().sources == (Source(FIRST, "t0"),)


class _Moving(Bucket):
    """A place whose training goes on: when its newest is read, that is pruned, and a newer one is there."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Commit and prune meanwhile."""
        newer = CheckpointId(1, 30)
        with self._lock:
            if keys.manifest_key(JOB, newer) not in self.objects:
                commit(self, newer, seed=3)
                self.delete(keys.manifest_key(JOB, LATER))
                for rank in range(2):
                    self.delete(keys.shard_key(JOB, LATER, rank))
        super().read_into(key, offset, into)


def test_a_training_that_goes_on_there(tmp_path: Path) -> None:
    """When the checkpoint is pruned while it is read, the newest that is there by then is taken."""
    origin = fill(_Moving())
    assert Begun(origin, LocalTier(tmp_path)).bring().sources == (Source(CheckpointId(1, 30), "t0"),)


def test_claims_without_checkpoint(tmp_path: Path) -> None:
    """A job that was started before and never committed anything still begins with what it is told to."""
    target = LocalTier(tmp_path)
    for generation in (1, 2, 3):
        catalog.claim_generation(target, "tuned", generation, None, 1.0)
    found = Begun(fill(Bucket()), target).bring()
    assert found.sources == (Source(LATER, "t0"),)
    assert found.last_generation == 4


@pytest.mark.parametrize("holder", [0, 1])
def test_what_the_job_has_wins(tmp_path: Path, holder: int) -> None:
    """With a checkpoint of the job on any of its tiers the other place is not even opened, and that is said once."""
    tiers = [LocalTier(tmp_path / "near"), LocalTier(tmp_path / "far")]
    Begun(fill(Bucket()), tiers[holder], step=FIRST.step).bring()
    job = Begun(fill(Bucket()), *tiers)
    for _ in range(2):
        assert job.bring().sources == (Source(FIRST, f"t{holder}"),)
    assert job.opened == 0
    assert job.told == [("resume not needed", {"source": f"/there/{JOB}", "step": FIRST.step})]


def test_a_tier_that_can_not_be_read_now(tmp_path: Path) -> None:
    """While a tier of the job can't be read it may hold the job, so nothing is brought."""
    job = Begun(fill(Bucket()), LocalTier(tmp_path))
    assert not asyncio.run(job.resuming.bring(StoreRead((), 0, {}, {"s3": StoreError("it is down")})))
    assert job.told == []
    assert job.opened == 0


def test_leftovers_on_a_further_tier_give_way(tmp_path: Path) -> None:
    """A file that a killed run has left on another tier under a needed name does not become part of a copy there."""
    far = LocalTier(tmp_path / "far")
    wrong = bytearray(good()[KEY])
    wrong[5000] ^= 1
    far.put(f"tuned/{FILE}", bytes(wrong))
    job = Begun(fill(Bucket()), LocalTier(tmp_path / "near"), far)
    job.bring()
    copying.upload(job.tiers[0].tier, far, "tuned", LATER)
    assert catalog.verify(far, "tuned", LATER) == []


class _Slow(LocalTier):
    """A tier whose first put of a file waits to be let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Wait before anything is written."""
        self.begun.set()
        assert self.go_on.wait(PATIENCE_S)
        super().put(key, data, create_only=create_only, pace=pace)


def test_the_end_of_the_job_ends_it(tmp_path: Path) -> None:
    """A job that ends meanwhile lets its thread end too, before the next piece, and nothing is committed."""
    target = _Slow(tmp_path)
    job = Begun(fill(Bucket()), target)

    async def stop() -> None:
        bringing = asyncio.ensure_future(job.resuming.bring(job.read()))
        assert await asyncio.to_thread(target.begun.wait, PATIENCE_S)
        bringing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await bringing
        target.go_on.set()

    asyncio.run(stop())
    assert list(target.list("")) == []
    target.begun.clear()
    assert Begun(fill(Bucket()), target).bring().sources == (Source(LATER, "t0"),)


class _Silent(Bucket):
    """A tier that answers nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go_on, self.answered = threading.Event(), threading.Event(), threading.Event()

    def list(self, prefix: str) -> Iterator[Entry]:
        """Wait first."""
        self.asked.set()
        assert self.go_on.wait(PATIENCE_S)
        self.answered.set()
        return super().list(prefix)


def test_nobody_waits_for_an_origin_that_does_not_answer(tmp_path: Path) -> None:
    """The end of the job, and of its agent's loop, comes while a request to the origin still hangs."""
    origin = _Silent()
    job = Begun(origin, LocalTier(tmp_path))

    async def stop() -> None:
        bringing = asyncio.ensure_future(job.resuming.bring(job.read()))
        assert await asyncio.to_thread(origin.asked.wait, PATIENCE_S)
        bringing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await bringing

    asyncio.run(stop())
    assert not origin.answered.is_set()
    origin.go_on.set()
    assert origin.answered.wait(PATIENCE_S)
    assert list(LocalTier(tmp_path).list("")) == []
