"""Prunes as an agent has them done: in turn, without keeping threads from flushes, and with an eye on names."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptd.config import JobConfig
from ckptd.coordination.embedded import EmbeddedCoordinator
from ckptd.core.events import Claim, Claimed, SetupFailed
from ckptd.core.prune_events import MakeRoom, Prune, Pruned, RoomMade
from ckptd.daemon.arena import Arena, Budget
from ckptd.daemon.checkpoints import Checkpoints
from ckptd.daemon.job_store import JobStore
from ckptd.errors import FencedError, StoreError
from ckptd.storage import catalog, keys
from ckptd.storage.local import LocalTier
from ckptd.storage.tier import Entry
from ckptd.store_config import StoreConfig
from ckptd.tiers import JobTier
from ckptd.types import CheckpointId
from tests.daemon.job_store.stored import committed, flush, pattern, steps

NO_NAMES: tuple[str, ...] = ()


class GatedTier(LocalTier):
    """A folder that lists nothing before it may."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.may_list = threading.Event()
        self.may_list.set()

    def list(self, prefix: str) -> Iterator[Entry]:
        """List, when that may be done."""
        assert self.may_list.wait(30)
        return super().list(prefix)


@pytest.fixture
def tier(tmp_path: Path) -> GatedTier:
    """A folder with four checkpoints of a job."""
    made = GatedTier(tmp_path / "runs")
    with ThreadPoolExecutor(2) as pool:
        store = JobStore(made, "job", pool)
        assert store.claim(1, None)
        for step in range(1, 5):
            flush(store, [{"trained": pattern(step)}], CheckpointId(1, step))
    return made


@pytest.fixture
def checkpoints(tier: GatedTier, tmp_path: Path) -> Iterator[Checkpoints]:
    """The job's checkpoints, as an agent has them."""

    def nowhere(url: str) -> LocalTier:
        raise StoreError(f"nothing is opened here: {url}")

    config = StoreConfig(str(tier.root))
    with ThreadPoolExecutor(2) as pool:
        yield Checkpoints(
            JobConfig("job", (), (config,)),
            [JobTier("local", tier, config)],
            coordinator=EmbeddedCoordinator(tmp_path / "home"),
            arena=Arena("job", Budget(2**30), 2),
            pool=pool,
            report=lambda event, fields: None,
            open_tier=nowhere,
        )


def order(ids: Sequence[CheckpointId], kept: Sequence[CheckpointId]) -> Prune:
    """Order a prune."""
    return Prune(tuple(ids), "local", ("no rule keeps it",) * len(ids), tuple(kept))


def test_prunes_that_wait_take_no_thread(tier: GatedTier, checkpoints: Checkpoints) -> None:
    """However many prunes wait for a slow one, there is a thread for a flush."""

    async def job() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        tier.may_list.clear()
        prunes = [asyncio.ensure_future(checkpoints.prune(order(steps(step), steps(4)))) for step in (1, 2, 3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        try:
            await asyncio.wait_for(asyncio.to_thread(lambda: None), 10)
        finally:
            tier.may_list.set()
        await asyncio.gather(*prunes)
        await checkpoints.close()

    asyncio.run(job())
    assert committed(tier) == tuple(steps(4))


def test_what_is_left_is_said_with_its_names(tier: GatedTier, checkpoints: Checkpoints) -> None:
    """A checkpoint that was tagged meanwhile, or would not go, is named in the answer; the others go."""
    catalog.put_tag(tier, "job", "paper", CheckpointId(1, 1), 1.0)

    manifest = tier.root / keys.manifest_key("job", CheckpointId(1, 4))
    document = manifest.read_bytes()

    async def job() -> None:
        manifest.write_bytes(b"{")
        _, made = await checkpoints.make_room(MakeRoom("local", tuple(steps(1, 3)), ("full", "full"), tuple(steps(4))))
        left = {CheckpointId(1, 1): ("paper",), CheckpointId(1, 3): NO_NAMES}
        assert made == RoomMade("local", tuple(steps(1, 3)), 0, left)
        manifest.write_bytes(document)
        removed, answer = await checkpoints.prune(order(steps(1, 2), steps(3, 4)))
        assert (removed.errors, committed(tier)) == ([], tuple(steps(1, 3, 4)))
        assert answer == Pruned("local", tuple(steps(1, 2)), {CheckpointId(1, 1): ("paper",)})
        await checkpoints.close()

    asyncio.run(job())


def test_a_state_folder_that_can_not_be_written(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """A generation that can't be claimed for want of room in the state folder is one to be claimed later."""
    file = tmp_path / "home" / "coordinator.sqlite"

    async def job() -> None:
        good = file.read_bytes()
        file.write_bytes(b"no database" * 100)
        failed = await checkpoints.claim(Claim(2, CheckpointId(1, 4)))
        assert isinstance(failed, SetupFailed)
        assert failed.passing
        file.write_bytes(good)
        assert await checkpoints.claim(Claim(2, CheckpointId(1, 4))) == Claimed(2)
        await checkpoints.close()

    asyncio.run(job())


def test_a_name_makes_no_generation_ours(tier: GatedTier, checkpoints: Checkpoints) -> None:
    """An agent that was replaced prunes nothing, also when somebody has named a checkpoint of its heir."""
    with ThreadPoolExecutor(2) as pool:
        heir = JobStore(tier, "job", pool)
        assert heir.claim(2, CheckpointId(1, 4))
        flush(heir, [{"trained": pattern(9)}], CheckpointId(2, 5), CheckpointId(1, 4))
    catalog.put_tag(tier, "job", "paper", CheckpointId(2, 5), 1.0)

    async def job() -> None:
        removed, _ = await checkpoints.prune(order(steps(1, 2, 3), steps(4)))
        assert [type(error) for error in removed.errors] == [FencedError]
        await checkpoints.close()

    asyncio.run(job())
    assert len(committed(tier)) == 5
