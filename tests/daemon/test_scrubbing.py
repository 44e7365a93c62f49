"""Stored copies that are read again and mended: by the thread alone, and by an agent whose job goes on training."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ckptd.config import JobConfig
from ckptd.core.restore import Source
from ckptd.core.scrub_events import Mended, Scrubbed
from ckptd.daemon.further_tiers import FurtherTiers
from ckptd.daemon.job_store import JobStore
from ckptd.daemon.scrubbing import Scrubber
from ckptd.errors import NotFoundError, StoreError
from ckptd.storage import catalog
from ckptd.storage.local import LocalTier
from ckptd.storage.tier import Cost
from ckptd.store_config import StoreConfig
from ckptd.tiers import JobTier
from ckptd.types import CheckpointId
from tests.daemon.harness import AgentThread, Node, eventually, train_until, until, use_bytes_framework
from tests.daemon.job_store.stored import flush, pattern

FIRST, LATER = CheckpointId(1, 10), CheckpointId(1, 20)


class Far(LocalTier):
    """A folder that counts as far away, and may be down."""

    down = False

    @property
    def capabilities(self) -> Any:
        """Those of a folder, at another cost."""
        found = super().capabilities
        return type(found)(**{name: getattr(found, name) for name in found.__slots__} | {"cost": Cost.NETWORK})

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Fill it, unless nobody answers."""
        if self.down:
            raise StoreError("no answer")
        super().read_into(key, offset, into)


@pytest.fixture
def near(tmp_path: Path) -> Iterator[LocalTier]:
    """The first tier, with two checkpoints of which the later one refers to the other; "far" has the same."""
    tier = LocalTier(tmp_path / "near")
    with ThreadPoolExecutor(2) as pool:
        store, further = JobStore(tier, "job", pool), JobStore(Far(tmp_path / "far"), "job", pool)
        assert store.claim(1, None)
        tiers = FurtherTiers("job", store, {"far": further}, {}, lambda *_: None)
        for number, checkpoint in enumerate((FIRST, LATER)):
            flush(store, [{"frozen": pattern(7, 2**20), "x": pattern(number)}], checkpoint)
            tiers.upload(checkpoint, "far")
        yield tier


@pytest.fixture
def far(near: LocalTier, tmp_path: Path) -> Far:
    """The further tier."""
    return Far(tmp_path / "far")


def scrubber(*tiers: LocalTier, max_bytes_per_s: int = 0) -> Scrubber:
    """What reads the tiers, called "near" and "far"."""
    names = zip(("near", "far"), tiers, strict=False)
    config = StoreConfig("/unused", scrub_max_bytes_per_s=max_bytes_per_s)
    return Scrubber("job", [JobTier(name, tier, config) for name, tier in names], lambda *_: None)


def once(scrubs: Scrubber, source: Source, *, mend: bool = False) -> Any:
    """Scrub or mend a copy, and close."""

    async def run() -> Scrubbed | Mended:
        try:
            return await (scrubs.mend(source) if mend else scrubs.scrub(source))
        finally:
            await scrubs.close()

    return asyncio.run(run())


def flip(path: Path, at: int = -1) -> None:
    """Flip a bit of a file where it lies."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def files(folder: Path, checkpoint: CheckpointId) -> list[Path]:
    """Every file in a checkpoint's own folder."""
    return sorted((folder / f"job/g{checkpoint.generation:06d}/s{checkpoint.step:012d}").iterdir())


@pytest.mark.parametrize("checkpoint", [FIRST, LATER])
def test_a_sound_copy(near: LocalTier, checkpoint: CheckpointId) -> None:
    """Nothing is found in it, and every byte that it needs was read, those in the other one's files too."""
    found = once(scrubber(near), Source(checkpoint, "near"))
    assert (found.problems, found.error) == ((), None)
    assert found.size_bytes > 2**20


@pytest.mark.parametrize("what", ["manifest.json", "rank-00000.safetensors", "gone"])
@pytest.mark.parametrize("far_is_damaged", [False, True])
def test_a_damaged_copy_is_found_and_mended(near: LocalTier, far: Far, what: str, far_is_damaged: bool) -> None:
    """On a disk as behind a network: it is named, and what mends it is the other tier's, to the last byte."""
    folder = Path(far.url if far_is_damaged else near.url)
    (damaged,) = [
        path for path in files(folder, FIRST) if path.name == (what if what != "gone" else "rank-00000.safetensors")
    ]
    whole = damaged.read_bytes()
    flip(damaged, len(whole) // 2) if what != "gone" else damaged.unlink()
    source = Source(FIRST, "far" if far_is_damaged else "near")
    found = once(scrubber(near, far), source)
    assert found.problems
    assert found.error is None
    mended = once(scrubber(near, far), source, mend=True)
    assert (mended.problems, mended.error) == ((), None)
    assert set(mended.origins.values()) == {"near" if far_is_damaged else "far"}
    assert damaged.read_bytes() == whole
    assert once(scrubber(near, far), source).problems == ()


def test_what_no_tier_has(near: LocalTier, far: Far) -> None:
    """When all copies of a file are damaged it is said which, nothing is changed, and what can be mended is."""
    for folder in (Path(near.url), Path(far.url)):
        flip(next(path for path in files(folder, FIRST) if path.suffix == ".safetensors"))
    mended = once(scrubber(near, far), Source(FIRST, "near"), mend=True)
    (problem,) = mended.problems
    assert "no good copy" in problem
    assert mended.origins == {}


def test_a_tier_that_is_down_is_not_damaged(near: LocalTier, far: Far) -> None:
    """What can't be read behind a network now says nothing about it; what a disk can't read is lost."""
    far.down = True
    found = once(scrubber(near, far), Source(FIRST, "far"))
    assert isinstance(found.error, StoreError)
    assert found.problems == ()
    shard = next(path for path in files(Path(near.url), FIRST) if path.suffix == ".safetensors")
    shard.unlink()
    shard.mkdir()  # reading it fails, whoever asks
    assert once(scrubber(near, far), Source(FIRST, "near")).problems


def test_what_is_pruned_is_not_found(near: LocalTier) -> None:
    """A copy without manifest is none, and that is not called damage."""
    for path in files(Path(near.url), LATER):
        path.unlink()
    assert isinstance(once(scrubber(near), Source(LATER, "near")).error, NotFoundError)
    mended = once(scrubber(near), Source(LATER, "near"), mend=True)
    assert isinstance(mended.error, NotFoundError)


@pytest.mark.parametrize("mend", [False, True])
def test_the_end_of_a_job_ends_it_at_once(near: LocalTier, far: Far, mend: bool) -> None:
    """A scrub that would take hours at its bandwidth ends when the job does, and changes nothing any more."""
    if mend:
        flip(next(path for path in files(Path(near.url), LATER) if path.suffix == ".safetensors"))
    before = {path: path.read_bytes() for path in files(Path(near.url), LATER)}
    scrubs = scrubber(near, far, max_bytes_per_s=100)

    async def run() -> bool:
        work = asyncio.ensure_future((scrubs.mend if mend else scrubs.scrub)(Source(LATER, "near")))
        await eventually(lambda: any(thread.name.startswith("ckptd-scrub") for thread in threading.enumerate()))
        await asyncio.sleep(0.05)
        await scrubs.close()
        return bool((await work).error)

    assert asyncio.run(run())
    assert {path: path.read_bytes() for path in files(Path(near.url), LATER)} == before


def _submit(agent: AgentThread, stores: list[dict[str, object]]) -> None:
    config = {"name": "job", "command": [], "nproc": 1, "every_s": 0.1, "store": stores}
    agent.call(lambda: agent.agent.submit(JobConfig.from_json(config)))


def test_a_training_job_mends_its_disk(
    node: Node, start_agent: Callable[..., AgentThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte that changes on the disk of a running job is found, mended from the other tier and told of."""
    use_bytes_framework(monkeypatch)
    agent, far = start_agent(), node.folder / "far"
    _submit(agent, [{"url": str(node.store), "scrub": "1s", "keep_last": 100}, {"url": str(far), "keep_last": 100}])
    puppet = node.puppet()
    puppet.attach(100_000)
    train_until([puppet], lambda: len(list(far.glob("job/*/*/manifest.json"))) > 1, "two uploads")
    oldest = min(far.glob("job/*/*/manifest.json"))
    shard = node.store / oldest.relative_to(far).parent / "rank-00000.safetensors"
    whole = shard.read_bytes()
    flip(shard, 5000)
    train_until([puppet], lambda: agent.events("checkpoint mended"), "the mending")
    (damaged,), (mended,) = agent.events("checkpoint damaged"), agent.events("checkpoint mended")
    assert shard.read_bytes() == whole
    assert damaged["step"] == mended["step"] == int(shard.parent.name[1:])
    assert (damaged["tier"], mended["tier"]) == ("local", "local")
    assert mended["origins"] == ["local-2"]
    assert "rank-00000.safetensors" in damaged["error"]
    status = agent.status()["scrub"]
    assert (status["mended"], status["damaged"]) == (1, [])
    assert status["checked"] >= 1
    puppet.kill()


def test_what_can_not_be_mended_is_not_restored(
    node: Node, start_agent: Callable[..., AgentThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without another tier a damaged checkpoint is said to be so, shown by `status`, and stays as it is."""
    use_bytes_framework(monkeypatch)
    agent = start_agent()
    _submit(agent, [{"url": str(node.store), "scrub": "1s", "keep_last": 100}])
    puppet = node.puppet()
    puppet.attach(100_000)
    train_until([puppet], lambda: len(node.manifests()) > 1, "two commits")
    shard = node.manifests()[0].parent / "rank-00000.safetensors"
    os.truncate(shard, 5000)
    train_until([puppet], lambda: agent.events("mend failed"), "the attempt to mend it")
    assert [item["step"] for item in agent.status()["scrub"]["damaged"]] == [int(shard.parent.name[1:])]
    assert shard.stat().st_size == 5000
    until(lambda: not catalog.verify(LocalTier(node.store), "job", CheckpointId(1, agent.committed())), "a sound one")
    puppet.kill()


def test_a_damaged_manifest_does_not_stop_prunes_for_ever(
    node: Node, start_agent: Callable[..., AgentThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept and can't be read keeps everything else there, which is said; once mended, all that is due goes."""
    use_bytes_framework(monkeypatch)
    far = node.folder / "far"
    near_store: dict[str, object] = {"url": str(node.store), "scrub": "1d"}
    far_store: dict[str, object] = {"url": str(far), "keep_last": 100}
    first = start_agent()
    _submit(first, [{**near_store, "keep_last": 100}, far_store])
    puppet = node.puppet()
    puppet.attach(1000)
    train_until([puppet], lambda: len(list(far.glob("job/*/*/manifest.json"))) > 1, "two uploads")
    puppet.kill()
    until(lambda: first.call(lambda: first.job().idle), "the end of the last upload")
    first.close()
    kept = min(path for path in node.manifests() if (far / path.relative_to(node.store)).exists())
    catalog.put_tag(LocalTier(node.store), "job", "paper", CheckpointId(1, int(kept.parent.name[1:])), 0.0)
    whole = kept.read_bytes()
    flip(kept, len(whole) // 2)
    second = start_agent()
    _submit(second, [{**near_store, "keep_last": 1}, far_store])
    puppet = node.puppet()
    puppet.attach(1000)
    train_until([puppet], lambda: second.events("prune failed"), "a prune that is given up")
    assert not second.events("checkpoint pruned")
    train_until([puppet], lambda: second.events("checkpoint mended"), "the mending")
    assert kept.read_bytes() == whole
    train_until([puppet], lambda: len(node.manifests()) == 2, "the end of everything but the newest and the tagged one")
    until(lambda: second.events("checkpoint pruned"), "the word about it")
    puppet.kill()
