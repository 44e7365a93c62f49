"""Several tiers of a job: how they are opened, and what is read from all of them together."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ckptd.config import JobConfig
from ckptd.core.restore import Source
from ckptd.daemon.further_tiers import FurtherTiers
from ckptd.daemon.job_store import JobStore
from ckptd.daemon.tiers import open_tiers, read
from ckptd.errors import FencedError, RefusedError, StoreError
from ckptd.plugin.manager import PluginManager
from ckptd.storage import catalog, keys
from ckptd.storage.local import LocalTier
from ckptd.storage.pacing import StoppedError
from ckptd.storage.tier import Entry
from ckptd.store_config import StoreConfig
from ckptd.tiers import JobTier
from ckptd.types import CheckpointId
from tests.daemon.job_store.stored import flush, pattern, prune


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for flushes."""
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def open_store(tmp_path: Path, pool: ThreadPoolExecutor) -> Callable[[str], JobStore]:
    """Opens the job's part of a tier by its folder's name."""
    return lambda name: JobStore(LocalTier(tmp_path / name), "job", pool)


def job_tier(store: JobStore, name: str) -> JobTier:
    """A tier of the job."""
    return JobTier(name, store.tier, StoreConfig(store.tier.url))


def further(first: JobStore, *others: JobStore) -> tuple[FurtherTiers, list[tuple[str, Any]]]:
    """The further tiers of a job, called "b0" and so on, and what they report."""
    told: list[tuple[str, Any]] = []
    stores = {f"b{number}": store for number, store in enumerate(others)}
    return FurtherTiers("job", first, stores, {}, lambda *event: told.append(event)), told


def test_an_empty_store_has_nothing(open_store: Callable[[str], JobStore]) -> None:
    """A job that never ran has no source and no generation."""
    found = read([job_tier(open_store("a"), "local")], "job")
    assert (found.sources, found.last_generation, found.unread) == ((), 0, {})


def test_the_store_is_read_in_the_order_of_the_lineage(open_store: Callable[[str], JobStore]) -> None:
    """What the store holds comes newest first, without the steps that a later generation has left behind."""
    store = open_store("a")
    first, lost, second = CheckpointId(1, 10), CheckpointId(1, 20), CheckpointId(2, 15)
    assert store.claim(1, None)
    for checkpoint in (first, lost):
        flush(store, [{"x": pattern(1)}], checkpoint)
    assert store.claim(2, first)
    flush(store, [{"x": pattern(2)}], second, first)
    assert store.claim(5, second)
    found = read([job_tier(store, "local")], "job")
    assert found.sources == (Source(second, "local"), Source(first, "local"))
    assert found.last_generation == 5
    assert {item.id for item in found.held["local"]} == {first, lost, second}


def test_copies_on_all_tiers_are_named(open_store: Callable[[str], JobStore]) -> None:
    """The newest checkpoint comes first wherever it is, and of one checkpoint the copy on the first tier."""
    near, far = open_store("a"), open_store("b")
    old, new = CheckpointId(1, 10), CheckpointId(1, 20)
    assert near.claim(1, None)
    flush(near, [{"x": pattern(1)}], old)
    tiers, _ = further(near, far)
    tiers.upload(old, "b0")
    flush(near, [{"x": pattern(2)}], new)
    tiers.upload(new, "b0")
    assert prune(near, [old], [new]) is None
    found = read([job_tier(near, "local"), job_tier(far, "b0")], "job")
    assert found.sources == (Source(new, "local"), Source(new, "b0"), Source(old, "b0"))


def test_values_are_read_where_any_tier_asks_for_them(open_store: Callable[[str], JobStore]) -> None:
    """What the bucket keeps by a metric is judged by what the disk says of it, also after a restart."""
    near, far = open_store("a"), open_store("b")
    assert near.claim(1, None)
    flush(near, [{"x": pattern(1)}], CheckpointId(1, 10))
    best = JobTier("b0", far.tier, StoreConfig(far.tier.url, keep_best="loss:min:1"))
    (item,) = read([job_tier(near, "local"), best], "job").held["local"]
    assert item.values == {"loss": 0.5}


class _Deaf(LocalTier):
    """A tier that lists nothing, for one reason or another."""

    problem: StoreError

    def list(self, prefix: str) -> Iterator[Entry]:
        raise self.problem


@pytest.mark.parametrize(("problem", "goes_on"), [(StoreError("it is down"), True), (RefusedError("no key"), False)])
def test_a_further_tier_that_can_not_be_read(
    open_store: Callable[[str], JobStore], tmp_path: Path, problem: StoreError, goes_on: bool
) -> None:
    """One that is down for a moment is named as unread; one that refuses us is what the start of the job ends with."""
    near = open_store("a")
    assert near.claim(1, None)
    flush(near, [{"x": pattern(1)}], CheckpointId(1, 10))
    deaf = _Deaf(tmp_path / "b")
    deaf.problem = problem
    tiers = [job_tier(near, "local"), JobTier("s3", deaf, StoreConfig("s3://bucket"))]
    if goes_on:
        found = read(tiers, "job")
        assert found.sources == (Source(CheckpointId(1, 10), "local"),)
        assert found.unread == {"s3": problem}
    else:
        with pytest.raises(RefusedError):
            read(tiers, "job")


def test_what_is_uploaded_comes_back(open_store: Callable[[str], JobStore]) -> None:
    """After the first tier is lost, a fetch brings a checkpoint back whole, also what an older file holds of it."""
    near, far = open_store("a"), open_store("b")
    old, new = CheckpointId(1, 10), CheckpointId(1, 20)
    assert near.claim(1, None)
    for number, checkpoint in enumerate((old, new)):
        flush(near, [{"frozen": pattern(7, 2**20), "x": pattern(number)}], checkpoint)
    tiers, _ = further(near, far)
    tiers.upload(new, "b0")
    assert catalog.verify(far.tier, "job", new) == []
    other = open_store("c")
    back, told = further(other, far)
    back.fetch(new, "b0")
    assert catalog.verify(other.tier, "job", new) == []
    assert "file fetched" in {event for event, _ in told}


def test_a_generation_of_somebody_else_is_fenced(open_store: Callable[[str], JobStore]) -> None:
    """Two agents with disks of their own and a bucket in common: who comes second uploads nothing there."""
    first, second, bucket = open_store("a"), open_store("b"), open_store("c")
    for store in (first, second):
        assert store.claim(1, None)
        flush(store, [{"x": pattern(1)}], CheckpointId(1, 10))
    ours, _ = further(first, bucket)
    theirs, _ = further(second, bucket)
    assert ours.claim_all(1)
    assert not theirs.claim_all(1)
    with pytest.raises(FencedError, match="somebody else's"):
        theirs.upload(CheckpointId(1, 10), "b0")
    ours.upload(CheckpointId(1, 10), "b0")
    assert further(first, bucket)[0].claim_all(1), "what an earlier agent of ours has claimed is ours"


def test_a_prune_leaves_what_is_on_its_way(open_store: Callable[[str], JobStore]) -> None:
    """Files that an upload under way needs, new or old, outlive a prune of everything else."""
    near, far = open_store("a"), open_store("b")
    old, new = CheckpointId(1, 10), CheckpointId(1, 20)
    assert near.claim(1, None)
    for number, checkpoint in enumerate((old, new)):
        flush(near, [{"frozen": pattern(7, 2**20), "x": pattern(number)}], checkpoint)
    tiers, _ = further(near, far)
    tiers.upload(old, "b0")
    files = catalog.load_manifest(near.tier, "job", new).files
    later = CheckpointId(1, 30)
    flush(near, [{"x": pattern(9)}], later)
    with far.needs.expecting(new, files):
        tiers.upload(later, "b0")
        assert prune(far, [old], [later]) is None
        held = {entry.key.removeprefix("job/") for entry in far.tier.list("job/")}
        assert [file for file in files if file.startswith("g000001/s000000000010/") and file not in held] == []


def test_a_late_claim_leaves_no_gap_in_the_lineage(open_store: Callable[[str], JobStore]) -> None:
    """A bucket that was down during restarts gets their records with the next upload, and can tell the lineage."""
    near, far = open_store("a"), open_store("b")
    first = CheckpointId(1, 10)
    assert near.claim(1, None)
    flush(near, [{"x": pattern(1)}], first)
    tiers, _ = further(near, far)
    tiers.upload(first, "b0")
    assert near.claim(2, first)
    assert near.claim(3, first)
    last = CheckpointId(3, 20)
    flush(near, [{"x": pattern(2)}], last, first)
    tiers.upload(last, "b0")
    assert catalog.holdings(far.tier, "job").parents == {1: None, 2: first, 3: first}
    found = read([job_tier(far, "b0")], "job")
    assert [source.id for source in found.sources] == [last, first]


# --- holding a job ------------------------------------------------------------------------------------------------


@pytest.fixture
def open_job(tmp_path: Path) -> Iterator[Callable[..., tuple[JobTier, ...]]]:
    """Opens the tiers of a job as an agent does, and closes what was opened."""
    plugins = PluginManager(lambda *_: None)
    opened: list[JobTier] = []

    def open_job(*stores: str, job: str = "job", patience_s: float = 0.0) -> tuple[JobTier, ...]:
        config = JobConfig(job, (), tuple(StoreConfig(str(tmp_path / store)) for store in stores))
        tiers = open_tiers(config, plugins, tmp_path, lambda *event: told.append(event), patience_s=patience_s)
        opened.extend(tiers)
        return tiers

    told: list[tuple[str, Any]] = []
    open_job.told = told  # type: ignore[attr-defined]
    yield open_job
    for item in opened:
        item.tier.close()


def test_an_agent_holds_every_tier(open_job: Callable[..., tuple[JobTier, ...]]) -> None:
    """A second agent is refused when it shares any tier with the first, and has let go of the others then."""
    first = open_job("a", "b")
    with pytest.raises(FencedError, match="is held by process"):
        open_job("c", "b")
    third = open_job("c")
    open_job("a", job="another")
    for item in (*first, *third):
        item.tier.close()
    open_job("a", "b", "c")


def test_a_network_that_is_down_keeps_no_job_from_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that can't be reached is looked at once, and for the rest left to who reads it; a disk is refused."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
    near = StoreConfig(str(tmp_path / "near"))
    told: list[Any] = []

    def opened(*stores: StoreConfig) -> tuple[JobTier, ...]:
        plugins = PluginManager(lambda *_: None)
        return open_tiers(JobConfig("job", (), stores), plugins, tmp_path, lambda *event: told.append(event))

    tiers = opened(near, StoreConfig("s3://bucket/runs", options={"endpoint": endpoint, "region": "us-east-1"}))
    assert [item.name for item in tiers] == ["local", "s3"]
    assert told == []
    for item in tiers:
        item.tier.close()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError):
        opened(near, StoreConfig(str(tmp_path / "file" / "runs")))


def test_an_agent_waits_for_the_one_before(open_job: Callable[..., tuple[JobTier, ...]]) -> None:
    """One that is about to end is waited for, and that is told once."""
    (first,) = open_job("a")
    closing = threading.Timer(1.0, first.tier.close)
    closing.start()
    open_job("a", patience_s=60.0)
    closing.join()
    ((event, fields),) = open_job.told  # type: ignore[attr-defined]
    assert (event, fields["tier"]) == ("store held", "local")
    assert f"process {os.getpid()}" in fields["error"]


def test_a_tier_without_locks_is_used_all_the_same(
    open_job: Callable[..., tuple[JobTier, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a filesystem has no locks the job runs, and the log says that nobody is kept out."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    (item,) = open_job("a")
    assert not item.tier.capabilities.exclusive_hold
    ((event, fields),) = open_job.told  # type: ignore[attr-defined]
    assert event == "store not held"
    assert "No locks available" in fields["error"]


def test_a_disk_that_is_passed_over_is_told_of(open_job: Callable[..., tuple[JobTier, ...]], tmp_path: Path) -> None:
    """When one of several disks takes nothing the agent's log names it, once, with the reason."""
    (item,) = open_job(f"a,{tmp_path}/b")
    (tmp_path / "b" / "job").write_bytes(b"a file where a folder is needed")
    for rank in range(4):
        item.tier.put(keys.shard_key("job", CheckpointId(1, 10), rank), b"x")
    ((event, fields),) = open_job.told  # type: ignore[attr-defined]
    assert (event, fields["disk"]) == ("disk passed over", f"{tmp_path}/b")
    assert "can't write" in fields["error"]


def test_an_upload_beside_the_claim_of_the_next_generation(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """What an agent uploads of its last generation is committed, though its own next one is being claimed there."""
    done: list[Any] = []

    class Watched(LocalTier):
        """A tier whose second record has just been put, and not been answered."""

        def put(self, key: str, *args: Any, **options: Any) -> None:
            super().put(key, *args, **options)
            if key.endswith("g000002/generation.json"):
                done.append(others.upload(CheckpointId(1, 10), "b0"))

    first = JobStore(LocalTier(tmp_path / "a"), "job", pool)
    others, _ = further(first, JobStore(Watched(tmp_path / "b"), "job", pool))
    assert first.claim(1, None)
    flush(first, [{"x": pattern(1)}], CheckpointId(1, 10))
    assert others.claim_all(1)
    assert first.claim(2, CheckpointId(1, 10))
    assert others.claim_all(2)
    assert len(done) == 1
    assert catalog.verify(LocalTier(tmp_path / "b"), "job", CheckpointId(1, 10)) == []


@pytest.mark.parametrize("what", ["upload", "fetch", "fetch again"])
def test_the_end_of_the_job_ends_what_is_on_its_way(tmp_path: Path, pool: ThreadPoolExecutor, what: str) -> None:
    """An upload or a fetch ends before its next piece once nobody waits for it, also while it looks at what is there.

    Nothing is committed then, and no file is said to be damaged that nobody has read to its end.
    """

    class Stopping(LocalTier):
        """A tier that is looked at when the job ends."""

        def size_bytes(self, key: str) -> int:
            others.stop()
            return super().size_bytes(key)

    checkpoint = CheckpointId(1, 10)
    near, far = JobStore(Stopping(tmp_path / "a"), "job", pool), JobStore(LocalTier(tmp_path / "b"), "job", pool)
    others, told = further(near, far)
    begun = near if what == "upload" else far
    assert begun.claim(1, None)
    flush(begun, [{"x": pattern(1)}], checkpoint)
    if what == "fetch again":
        shutil.copytree(tmp_path / "b", tmp_path / "a")
        (tmp_path / "a" / keys.manifest_key("job", checkpoint)).unlink()
    target = tmp_path / ("b" if what == "upload" else "a")
    with pytest.raises(StoppedError):
        (others.upload if what == "upload" else others.fetch)(checkpoint, "b0")
    assert not (target / keys.manifest_key("job", checkpoint)).exists()
    assert [event for event, _ in told if event in ("file damaged", "copy unusable")] == []
