"""A job's checkpoints as its supervisor handles them: what storage threads did, as inputs of the machine, and offers.

Every method that touches a tier does so in a thread. What comes of it is returned and not fed, so that whoever asked
decides what to make of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from ckptd.config import JobConfig
from ckptd.coordination.coordinator import Coordinator, next_generation
from ckptd.core import events as e
from ckptd.core.adopt_events import StoreUnread
from ckptd.core.prune_events import Collect, MakeRoom, Prune, Pruned, RoomMade
from ckptd.core.restore import MEMORY, Source
from ckptd.daemon.arena import Arena
from ckptd.daemon.further_tiers import FurtherTiers
from ckptd.daemon.job_store import JobStore
from ckptd.daemon.offers import Offer, SlotOffer, StoredOffer, close_all, read_only
from ckptd.daemon.resuming import OpenTier, Resuming
from ckptd.daemon.scrubbing import Scrubber
from ckptd.daemon.tiers import read
from ckptd.errors import AgentError, CkptdError, DamagedError, FencedError, StoreError, invariant
from ckptd.pruning.prune import Removed
from ckptd.storage import catalog, keys, manifest
from ckptd.storage.pacing import Pacer
from ckptd.storage.tier import Report
from ckptd.tiers import JobTier
from ckptd.types import CheckpointId

Result = TypeVar("Result")
_CLAIM_TRIES = 100
_PRUNE_PATIENCE_S = 10.0
"""How long the end of a job waits for prunes: those of the last commits mostly run with it."""
_CALLS_AT_ONCE = 3
"""To one tier: an upload or a fetch, a prune, and a look at what is there."""
_HEADER_ENTRY_BYTES = 256
"""Of an image's header, for a tensor; the room that slots have to grow covers what it is more."""


@dataclass(frozen=True, slots=True)
class _Checked:
    """A checkpoint on a tier that can be offered."""

    source: Source
    document: bytes
    files: frozenset[str]
    world_size: int
    shard_bytes: Mapping[int, int]
    """About how large an image each of its ranks captured."""


class Checkpoints:
    """The checkpoints of one job. One offer at a time, to the ranks of one generation."""

    def __init__(
        self,
        config: JobConfig,
        tiers: Sequence[JobTier],
        *,
        coordinator: Coordinator,
        arena: Arena,
        pool: Executor,
        report: Report,
        open_tier: OpenTier,
    ) -> None:
        """Keep the checkpoints of a job on `tiers`, fastest first; `report` is told what happens there.

        `open_tier` opens the place of whatever else the job is to resume from.
        """
        self._job = config.name
        self._tiers = tiers
        self._first = tiers[0].name
        pace = Pacer(config.flush_max_bytes_per_s) if config.flush_max_bytes_per_s else None
        self.store = _store(tiers[0], config, pool, pace)
        others = {item.name: _store(item, config, pool) for item in tiers[1:]}
        self._stores = {self._first: self.store, **others}
        self._turns = {name: asyncio.Lock() for name in self._stores}
        bounds = {item.name: item.config.upload_max_bytes_per_s for item in tiers[1:]}
        self.scrubber = Scrubber(config.name, tiers, report)
        self._further = FurtherTiers(config.name, self.store, others, bounds, report)
        origin = config.resume_from
        self._resuming = None if origin is None else Resuming(config, tiers, origin, open_tier, report)
        self._patient = ThreadPoolExecutor(_CALLS_AT_ONCE * len(tiers), thread_name_prefix="ckptd-tier")
        """For what may wait for a network, so that a flush or a restore never waits for a thread."""
        self._started = False
        self._coordinator = coordinator
        self._arena = arena
        self._documents: dict[CheckpointId, bytes] = {}
        """Of snapshots in memory that have been flushed: with digests."""
        self._checked: _Checked | None = None
        self._offered: tuple[int, asyncio.Future[Offer]] | None = None
        self._reserving: asyncio.Future[None] | None = None

    async def read(self) -> e.Input:
        """Look what the tiers hold, after they were given what a new job resumes from; raises why that can't be."""
        found = await self._patiently(read, self._tiers, self._job)
        if self._resuming is None or not await self._resuming.bring(found):
            return found
        return await self._patiently(read, self._tiers, self._job)

    def adopt(self, generation: int) -> None:
        """Go on with a generation that an agent before us has claimed."""
        self.store.needs.own(generation)
        self._started = True

    async def look_again(self) -> e.Input:
        """Look what the tiers hold of a job that is running."""
        try:
            return await self._patiently(read, self._tiers, self._job)
        except CkptdError as error:
            return StoreUnread(error)

    async def claim(self, order: e.Claim) -> e.Input:
        """Claim a generation; raises `FencedError` when somebody else takes every number.

        The first one is claimed on every tier at once, so that two agents with a bucket in common notice each other.
        """
        number = order.at_least
        for _ in range(_CLAIM_TRIES):
            try:
                number = await asyncio.to_thread(next_generation, self._coordinator, self._job, number)
            except StoreError as error:
                return e.SetupFailed(error, passing=True)  # the disk of the state folder may be full
            if not await asyncio.to_thread(self.store.claim, number, order.parent):
                continue
            if self._started or await self._patiently(self._further.claim_all, number):
                self._started = True
                return e.Claimed(number)
        raise FencedError(f"somebody else claims every generation of job {self._job}", hint="stop the other one")

    async def check(self, source: Source, world_size: int) -> e.Input:
        """See whether a checkpoint can be offered to `world_size` ranks; one from afar is brought first."""
        copied = source.tier != self._first
        try:
            if copied:
                await self._patiently(self._further.fetch, source.id, source.tier)
            self._checked = await asyncio.to_thread(_check, self.store, source)
        except CkptdError as error:
            return e.FetchFailed(source, error)
        if self._checked.world_size == world_size:
            self._reserving = asyncio.ensure_future(asyncio.to_thread(self._reserve_ahead, self._checked.shard_bytes))
        return e.Fetched(source, self._checked.world_size, copied)

    def _reserve_ahead(self, shard_bytes: Mapping[int, int]) -> None:
        """Have the slots that ranks will ask for cleared while they import torch: that takes a second per 2 GB."""
        for rank, size_bytes in shard_bytes.items():
            try:
                self._arena.reserve_ahead(rank, size_bytes)
            except CkptdError:
                return  # whoever asks for them will be told why

    async def flush(self, order: e.Flush, alive: Collection[CheckpointId]) -> e.Input:
        """Make a snapshot durable. Of those in `alive`, the ones in memory, manifests are kept to be offered."""
        try:
            result = await asyncio.to_thread(self.store.flush, order, self._images(order))
        except CkptdError as error:
            return e.FlushFailed(order.id, error)
        self._documents[order.id] = result.document
        self._documents = {item: document for item, document in self._documents.items() if item in alive}
        return e.Committed(order.id, self._first, result.size_bytes, result.seconds)

    async def upload(self, order: e.Upload) -> e.Input:
        """Copy a checkpoint from the first tier to a further one."""
        try:
            result = await self._patiently(self._further.upload, order.id, order.tier)
        except CkptdError as error:
            return e.UploadFailed(order.id, order.tier, error)
        return e.Committed(order.id, order.tier, result.size_bytes, result.seconds)

    async def prune(self, order: Prune) -> tuple[Removed, e.Input]:
        """Remove checkpoints; return what was done and what could not be."""
        removed, left = await self._in_turn(order.tier, self._prune, order)
        unreadable: Sequence[CheckpointId] = ()
        if any(isinstance(error, DamagedError) for error in removed.errors):
            unreadable = await self._patiently(self._unreadable, order)
        return removed, Pruned(order.tier, order.ids, left, tuple(unreadable))

    def _unreadable(self, order: Prune) -> list[CheckpointId]:
        """Return what is to stay and keeps everything else from going, since nobody knows what it needs."""
        found: list[CheckpointId] = []
        for checkpoint in order.kept:
            try:
                catalog.load_manifest(self._stores[order.tier].tier, self._job, checkpoint)
            except DamagedError:
                found.append(checkpoint)
            except CkptdError:
                continue
        return found

    async def collect(self, order: Collect) -> Removed:
        """Remove what nobody needs."""
        pruning = self._stores[order.tier].pruning
        return await self._in_turn(order.tier, pruning.collect, order.kept, order.needed_from)

    async def make_room(self, order: MakeRoom) -> tuple[Removed, e.Input]:
        """Empty a tier that is full as far as that goes."""
        removed, left = await self._in_turn(order.tier, self._prune, order)
        return removed, RoomMade(order.tier, order.ids, removed.freed_bytes, left)

    async def _in_turn(self, tier: str, act: Callable[..., Result], *arguments: object) -> Result:
        """Prune a tier when nobody else does: who waited in a thread would keep flushes from having one."""
        async with self._turns[tier]:
            return await self._patiently(act, *arguments)

    def _prune(self, order: Prune | MakeRoom) -> tuple[Removed, Mapping[CheckpointId, tuple[str, ...]]]:
        """Prune but for what got a name since the tier was read; return also what is left, with its names."""
        item = next(item for item in self._tiers if item.name == order.tier)
        try:
            tags = catalog.tags(item.tier, self._job) if item.config.keep_tagged else {}
        except CkptdError as error:
            return Removed(errors=[error]), dict.fromkeys(order.ids, ())
        names = {item: tuple(name for name, tag in tags.items() if tag.id == item) for item in order.ids}
        named = [checkpoint for checkpoint in order.ids if names[checkpoint]]
        pruning = self._stores[order.tier].pruning
        prune = pruning.prune if isinstance(order, Prune) else pruning.make_room
        removed = prune([checkpoint for checkpoint in order.ids if not names[checkpoint]], [*order.kept, *named])
        return removed, {item: names[item] for item in order.ids if item not in removed.checkpoints}

    async def close(self) -> None:
        """Let go of the tiers."""
        self._further.stop()
        await self.scrubber.close()
        closing = (self._patiently(store.pruning.close, _PRUNE_PATIENCE_S) for store in self._stores.values())
        await asyncio.gather(*closing)
        for item in self._tiers:
            await self._patiently(item.tier.close)
        self._patient.shutdown(wait=False)

    async def _patiently(self, act: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._patient, act, *arguments)

    def _images(self, order: e.Flush) -> dict[int, memoryview]:
        slots = {rank: self._arena.slots(rank)[slot] for rank, slot in order.slots.items()}
        return {rank: slot.view[: order.image_bytes[rank]] for rank, slot in slots.items()}

    # --- the offer --------------------------------------------------------------------------------------------

    def prepare(self, generation: int, source: Source, snapshot: e.Flush | None) -> None:
        """Make ready what a generation is offered, once for all its ranks; `snapshot` is where it lies in memory."""
        if self._offered is not None and self._offered[0] == generation:
            return
        self.withdraw()
        loop = asyncio.get_running_loop()
        offered: asyncio.Future[Offer]
        try:
            offered = loop.create_task(self._stored(source) if snapshot is None else self._in_slots(source, snapshot))
        except CkptdError as error:
            offered = loop.create_future()
            offered.set_exception(error)
        self._offered = (generation, offered)

    async def offer(self, generation: int) -> Offer:
        """Return what was prepared for a generation; raises why it can't be offered."""
        if self._offered is None or self._offered[0] != generation:
            raise AgentError(f"generation {generation} of job {self._job} is not offered anything any more")
        return await asyncio.shield(self._offered[1])

    async def open(self, generation: int, files: Sequence[str]) -> list[int]:
        """Return descriptors of files of the offer; the caller closes them."""
        offer = await self.offer(generation)
        offer.check(files)
        if offer.source.tier == MEMORY:
            return offer.open(files)
        opening = asyncio.ensure_future(asyncio.to_thread(offer.open, files))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_result)
            raise

    def withdraw(self) -> None:
        """End the offer: every rank has restored, or its generation is over."""
        if self._offered is not None:
            _, work = self._offered
            self._offered = None
            work.add_done_callback(_close_offer)  # at once when it is done; what threads do for it can't be stopped

    async def _stored(self, source: Source) -> Offer:
        checked = self._checked
        invariant(checked is not None and checked.source == source, f"{source} is offered and was not looked at")
        assert checked is not None  # for the type checker
        return StoredOffer(source, checked.document, checked.files, self.store)

    def _in_slots(self, source: Source, snapshot: e.Flush) -> Coroutine[Any, Any, Offer]:
        """Hold the slots at once, so that they stay what they are whatever becomes of the snapshot; then go on."""
        slots: dict[str, int] = {}
        try:
            for rank, slot in snapshot.slots.items():
                file = keys.folder(source.id) + keys.shard_file(rank)
                slots[file] = read_only(self._arena.slots(rank)[slot].descriptor)
        except BaseException:
            close_all(slots.values())
            raise
        return self._described(source, snapshot, self._images(snapshot), slots)

    async def _described(
        self, source: Source, snapshot: e.Flush, images: Mapping[int, memoryview], slots: Mapping[str, int]
    ) -> Offer:
        try:
            document = self._documents.get(source.id)
            if document is None:
                document = await asyncio.to_thread(self.store.snapshot_document, snapshot, images)
            return SlotOffer(source, document, slots)
        except BaseException:
            close_all(slots.values())
            raise
        finally:
            del images  # an error's traceback must not keep them


def _store(item: JobTier, config: JobConfig, pool: Executor, pace: Pacer | None = None) -> JobStore:
    return JobStore(
        item.tier,
        config.name,
        pool,
        reuse=config.reuse_unchanged,
        pace=pace,
        grace_s=item.config.grace_s,
        garbage_after_s=item.config.garbage_after_s,
    )


def _check(store: JobStore, source: Source) -> _Checked:
    document = store.check_offer(source.id)
    read = manifest.parse(document, str(source))
    return _Checked(source, document, read.files, read.world_size, _shard_bytes(read))


def _shard_bytes(read: manifest.Manifest) -> dict[int, int]:
    sizes = dict.fromkeys(range(read.world_size), 0)
    for tensor in read.tensors.values():
        for chunk in tensor.chunks:
            sizes[chunk.shard] += chunk.end - chunk.begin + _HEADER_ENTRY_BYTES
    return sizes


def _close_result(opening: asyncio.Future[list[int]]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        close_all(opening.result())


def _close_offer(work: asyncio.Future[Offer]) -> None:
    if not work.cancelled() and work.exception() is None:
        work.result().close()
