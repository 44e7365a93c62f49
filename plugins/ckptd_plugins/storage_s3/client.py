"""Requests to an S3 server by way of s3fs, from any thread: its coroutines run in a loop of the tier's own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

import s3fs
from s3fs.core import S3_RETRYABLE_ERRORS

from ckptd.errors import DamagedError, FencedError, StoreError
from ckptd.storage.pacing import be_nice
from ckptd_plugins.storage_s3.body import PIECE_BYTES, Body
from ckptd_plugins.storage_s3.failures import FROM_OUTSIDE, ReplacedError, StaleError, explain
from ckptd_plugins.storage_s3.options import Place, S3Options
from ckptd_plugins.storage_s3.upload import Answer

Result = TypeVar("Result")
_CLOSE_S = 5.0
_READ_BYTES = 2**20
_PLAIN_BODY_BYTES = 2**20
_CONNECTIONS = 64
_THINKS = "complete_multipart_upload"
_THINKS_TIMES = 20
"""Putting many parts together takes the server minutes. It sends blanks meanwhile, which aiohttp's timeout sees."""
_ONE_TRY = {"total_max_attempts": 1, "mode": "standard"}
"""Retrying is the work of the wrapper around a tier, which knows the deadline, waits with jitter and says what it does.
Tries of the client's own would multiply with those, unseen."""


class Progress:
    """When bytes were last seen to move, so that a request that stands still is told from one that is just slow."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self.moved()

    def moved(self) -> None:
        """Note that bytes have moved."""
        self._until_s = time.monotonic() + self._patience_s

    @property
    def left_s(self) -> float:
        """How long the request may still stand still."""
        return self._until_s - time.monotonic()


class WatchedBody(Body):
    """A body that aiohttp iterates over; given as `bytes` it would be copied and, beyond 1 MiB, hold up the loop."""

    def __init__(self, data: memoryview, progress: Progress) -> None:
        super().__init__(data)
        self._progress = progress

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        while piece := self.read(PIECE_BYTES):
            self._progress.moved()
            yield piece


class Client:
    """One bucket of one server."""

    def __init__(self, place: Place, options: S3Options) -> None:
        self._place = place
        self._patience_s = options.timeout_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="ckptd-s3", daemon=True)
        self._lock = threading.Lock()
        self._closed = False
        self._options = options
        self._filesystem = _filesystem(options, self._loop)
        self._thread.start()

    def _serve(self) -> None:
        be_nice()  # it does for uploads what else their threads would: it must not slow training down either
        self._loop.run_forever()

    def call(self, method: str, what: str, where: str, **arguments: Any) -> Answer:
        """Make one request of the bucket and return the answer; raises a `CkptdError` that says what failed where."""
        progress = Progress(self._patience_s * (_THINKS_TIMES if method == _THINKS else 1))
        body = arguments.get("Body")
        if isinstance(body, memoryview):
            arguments["Body"] = bytes(body) if len(body) <= _PLAIN_BODY_BYTES else WatchedBody(body, progress)
        return self._run(self._call(method, arguments), progress, what, where)

    def fetch(self, key: str, where: str) -> bytes:
        """Return an object whole; where the server tells its checksum it is compared."""
        progress = Progress(self._patience_s)
        return self._run(self._fetch(key, progress), progress, "read", where)

    def fetch_into(self, key: str, where: str, offset: int, into: memoryview, etag: str = "") -> None:
        """Fill memory from a range of an object, which has to be the one with this ETag, if one is given."""
        progress = Progress(self._patience_s)
        condition = {"IfMatch": etag} if etag else {}
        try:
            got = self._run(self._fetch_into(key, offset, into, condition, progress), progress, "read", where)
        except FencedError as error:
            raise ReplacedError(f"{where} was replaced while it was read") from error
        if got < len(into):
            raise DamagedError(f"{where} ends at byte {offset + got}, {offset + len(into)} were wanted")

    def close(self) -> None:
        """Close all connections and end the loop; what is still waiting for an answer fails."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        self._thread.join(_CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def _call(self, method: str, arguments: Answer) -> Answer:
        # s3fs adds the options that a method knows; fsspec names coroutines of filesystems with an underscore
        answer: Answer = await self._filesystem._call_s3(method, Bucket=self._place.bucket, **arguments)  # noqa: SLF001
        return answer

    async def _fetch(self, key: str, progress: Progress) -> bytes:
        answer = await self._call("get_object", {"Key": key, "ChecksumMode": "ENABLED"})
        pieces = []
        async with answer["Body"] as body:
            while piece := await body.read(_READ_BYTES):
                progress.moved()
                pieces.append(piece)
        return b"".join(pieces)

    async def _fetch_into(self, key: str, offset: int, into: memoryview, condition: Answer, progress: Progress) -> int:
        wanted = f"bytes={offset}-{offset + len(into) - 1}"
        answer = await self._call("get_object", {"Key": key, "Range": wanted, **condition})
        at = 0
        async with answer["Body"] as body:
            if not str(answer.get("ContentRange", "")).startswith(f"bytes {offset}-"):
                raise StoreError(f"the server sent other bytes of {key} than asked for: it does not know ranges")
            while at < len(into) and (piece := await body.read(min(_READ_BYTES, len(into) - at))):
                progress.moved()
                into[at : at + len(piece)] = piece
                at += len(piece)
        return at

    def _run(self, work: Coroutine[Any, Any, Result], progress: Progress, what: str, where: str) -> Result:
        with self._lock:  # what is begun is begun before the end, which cancels it; later nobody would answer
            if self._closed:
                work.close()
                raise StoreError(f"can't {what} {where}: the tier is closed")
            future = asyncio.run_coroutine_threadsafe(self._watch(work, progress), self._loop)
        try:
            return future.result()
        except CancelledError as error:
            raise StoreError(f"can't {what} {where}: the tier was closed meanwhile") from error
        except (*S3_RETRYABLE_ERRORS, *FROM_OUTSIDE) as error:
            failed = explain(error, what, where)
            if isinstance(failed, StaleError):
                self._renew()
            raise failed from error
        except BaseException:
            future.cancel()  # this thread was interrupted
            raise

    def _renew(self) -> None:
        """Look for credentials anew with the next call: those that were refused may have been replaced on disk."""
        with self._lock:
            if not self._closed:
                stale, self._filesystem = self._filesystem, _filesystem(self._options, self._loop)
                asyncio.run_coroutine_threadsafe(_let_go(stale), self._loop)

    async def _watch(self, work: Coroutine[Any, Any, Result], progress: Progress) -> Result:
        """Await `work` unless it stands still: aiohttp's own timeout of reading does not begin before all is sent."""
        task = asyncio.ensure_future(work)
        try:
            while True:
                done, _ = await asyncio.wait({task}, timeout=max(0.0, progress.left_s))
                if done:
                    return task.result()
                if progress.left_s <= 0:
                    raise TimeoutError
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def _end(self) -> None:
        try:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            if others:
                await asyncio.wait(others, timeout=_CLOSE_S / 2)
            await _let_go(self._filesystem)
            await self._loop.shutdown_default_executor()
        finally:
            self._loop.stop()


async def _let_go(filesystem: Any) -> None:
    """Close the connections of a filesystem, if it has been used."""
    creator = getattr(filesystem, "_s3creator", None)
    if creator is not None:
        await creator.__aexit__(None, None, None)


def _filesystem(options: S3Options, loop: asyncio.AbstractEventLoop) -> Any:
    filesystem = s3fs.S3FileSystem(
        anon=options.anon,
        endpoint_url=options.endpoint or None,
        client_kwargs={"region_name": options.region} if options.region else {},
        config_kwargs={
            "connect_timeout": options.connect_timeout_s,
            "read_timeout": options.timeout_s,
            "retries": _ONE_TRY,
            "s3": {"addressing_style": options.addressing, "payload_signing_enabled": False},  # see `puts`
            "max_pool_connections": _CONNECTIONS,
            "request_checksum_calculation": "when_required",  # we send our own
            "response_checksum_validation": "when_required",
        },
        s3_additional_kwargs=options.sent_along(),
        use_listings_cache=False,
        skip_instance_cache=True,  # a closed one must not come back
        loop=loop,
        **({"profile": options.profile} if options.profile else {}),
    )
    filesystem.retries = 1
    return filesystem
