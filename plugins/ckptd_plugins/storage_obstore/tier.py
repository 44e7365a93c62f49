"""The tier over obstore: a bucket and a prefix in the contract of `ckptd.storage.tier`.

The engine, written in Rust, reads, lists and puts small objects for little processor time. Large ones go by way of
`storage_s3.puts`, whose uploads a later put goes on with: the engine has no call for that.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Literal

import obstore

from ckptd.errors import CkptdError, DamagedError, RefusedError, StoreError
from ckptd.storage.stream import piece, stream_of
from ckptd.storage.tier import Capabilities, Cost, Data, Entry, FailureGroup, Pace
from ckptd_plugins.storage_obstore.failures import ENGINE_ERRORS, is_stale, translated
from ckptd_plugins.storage_obstore.requests import Requests
from ckptd_plugins.storage_obstore.stores import Stores
from ckptd_plugins.storage_s3.options import Place, S3Options
from ckptd_plugins.storage_s3.puts import Puts, check_create_only

_SMALL_BYTES = 2**20
"""What goes in one request of the engine's, which can't tell one that is slow from one that stands still."""
_CHUNK_BYTES = 2**18
"""What is copied at once on the way in: small enough for the cache of a core, large enough to be few calls."""
_LIST_CHUNK = 1000
_TEMPORARY = ".tmp-"
_PROBES = f"{_TEMPORARY}probes/"
"""A folder of their own, so that those which a killed agent has left are found without a look at every job."""

Take = Callable[[int, bytes], None]
"""Is given bytes of an object and where in it they lie."""


class ObstoreTier:
    """Objects below a prefix of an S3 bucket. Names that start with ``.tmp-`` are nobody's objects."""

    name = "s3"
    capabilities = Capabilities(
        create_only_put=True,
        atomic_replace=True,
        range_read=True,
        multipart=True,
        server_checksum=True,
        consistent_list=True,
        exclusive_hold=False,
        lends_files=False,
        cost=Cost.NETWORK,
        failure_group=FailureGroup.SITE,
    )

    def __init__(self, place: Place, options: S3Options) -> None:
        self._place, self._options = place, options
        self.url = place.url
        self._stores = Stores(place, options)
        self._requests = Requests(self._stores, place, options)
        self._puts = Puts(self._requests, place, options)
        self._attributes = {"Storage-Class": options.storage_class} if options.storage_class else None
        self._lock = threading.Lock()
        self._readers: ThreadPoolExecutor | None = None

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Send an object: whole when it is small, else in parts."""
        stream = stream_of(data)
        if stream.size_bytes > _SMALL_BYTES:
            self._puts.put(key, stream, pace, create_only=create_only)
            return
        whole = piece(stream, 0, stream.size_bytes) if stream.size_bytes else b""
        if pace is not None:
            pace(len(whole))
        mode: Literal["create", "overwrite"] = "create" if create_only else "overwrite"
        try:
            obstore.put(self._stores.engine, key, whole, attributes=self._attributes, use_multipart=False, mode=mode)
        except ENGINE_ERRORS as error:
            raise self._failed("create" if create_only else "put", key, error) from error

    def get(self, key: str) -> bytes:
        """Return an object whole.

        Nothing else vouches for all bytes of a manifest. So they are compared with the ETag, and where that is not
        their MD5, as with a key of KMS, they are read a second time and have to be the same.
        """
        found, etag = self._get(key)
        if etag != hashlib.md5(found, usedforsecurity=False).hexdigest() and self._get(key)[0] != found:
            raise StoreError(f"can't read {self._where(key)}: the bytes have changed on their way")
        return found

    def _get(self, key: str) -> tuple[bytes, str]:
        try:
            result = obstore.get(self._stores.engine, key)
            return bytes(result.bytes()), (result.meta["e_tag"] or "").strip('"')
        except ENGINE_ERRORS as error:
            raise self._failed("read", key, error) from error

    def size_bytes(self, key: str) -> int:
        """Return an object's size."""
        return int(self._head(key)["size"])

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Read a range, a large one in pieces side by side, straight into the memory given."""
        into = into.cast("B")
        if not len(into):
            self._head(key)
            return

        def take(at: int, chunk: bytes) -> None:
            into[at - offset : at - offset + len(chunk)] = chunk

        self._fetch(key, offset, offset + len(into), take)

    def open(self, key: str) -> int:
        """Bring an object into a memory file."""
        size_bytes = self.size_bytes(key)
        writable = os.memfd_create("ckptd-object", os.MFD_CLOEXEC)
        try:
            if size_bytes:
                os.ftruncate(writable, size_bytes)
                self._fetch(key, 0, size_bytes, lambda at, chunk: _write_at(writable, chunk, at))
            return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"can't keep {self._where(key)} in memory: {error.strerror}") from error
        finally:
            os.close(writable)

    def _fetch(self, key: str, begin: int, end: int, take: Take) -> None:
        """Hand over a range of one and the same object."""
        piece = partial(self._fetch_piece, key, take)
        step = self._options.part_bytes
        if end - begin <= step:
            piece(begin, end)
            return
        cuts = range(begin, end, step)
        futures = [self._reader().submit(piece, cut, min(cut + step, end)) for cut in cuts]
        if len(set(_all(futures))) > 1:
            raise StoreError(f"{self._where(key)} was replaced while it was read")

    def _fetch_piece(self, key: str, take: Take, begin: int, end: int) -> str | None:
        at = begin
        try:
            result = obstore.get(self._stores.engine, key, options={"range": (begin, end)})
            for chunk in result.stream(min_chunk_size=_CHUNK_BYTES):
                take(at, chunk)
                at += len(chunk)
        except ENGINE_ERRORS as error:
            raise self._failed("read", key, error) from error
        if at < end <= result.meta["size"]:
            raise StoreError(f"can't read {self._where(key)}: the answer broke off at byte {at} of {end}")
        if at < end:
            raise DamagedError(f"{self._where(key)} ends at byte {at}, {end} were wanted")
        return result.meta["e_tag"]

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield what the bucket lists; the engine lists folders, so names are compared here."""
        return (entry for entry in self._everything(prefix) if not _is_temporary(entry.key))

    def _everything(self, prefix: str) -> Iterator[Entry]:
        folder = prefix.rpartition("/")[0]
        try:
            for chunk in obstore.list(self._stores.engine, folder or None, chunk_size=_LIST_CHUNK):
                for found in chunk:
                    if found["path"].startswith(prefix):
                        yield Entry(found["path"], found["size"], found["last_modified"].timestamp())
        except ENGINE_ERRORS as error:
            raise self._failed("list", prefix, error) from error

    def delete(self, key: str) -> None:
        """Remove an object."""
        try:
            obstore.delete(self._stores.engine, key)
        except FileNotFoundError as error:
            failed = self._failed("delete", key, error)
            if isinstance(failed, RefusedError):
                raise failed from error
        except ENGINE_ERRORS as error:
            raise self._failed("delete", key, error) from error

    def sweep(self, prefix: str, older_than_s: float) -> Sequence[str]:
        """End open uploads, and remove probes."""
        removed = self._puts.sweep(prefix, older_than_s)
        before_s = time.time() - older_than_s
        for entry in {found.key: found for place in (prefix, _PROBES) for found in self._everything(place)}.values():
            if _is_temporary(entry.key) and entry.modified_at < before_s:
                self.delete(entry.key)
                removed.append(f"probe {self._where(entry.key)}")
        return removed

    def check_writable(self) -> None:
        """List nothing, which only works in a bucket that is there; then see that a probe can be put, and not twice."""
        probe = f"{_PROBES}{_TEMPORARY}{os.urandom(8).hex()}"
        for _ in self.list(f"{probe}/"):
            pass
        check_create_only(self, probe)

    def hold(self, job: str, deadline_s: float) -> None:
        """Refuse: a bucket has no locks."""
        del deadline_s
        raise RefusedError(f"{self.url} has no locks that could keep other agents from job {job}")

    def close(self) -> None:
        """Let go of the threads that read, and of connections; those of the engine go with it."""
        self._puts.close()
        with self._lock:
            readers, self._readers = self._readers, None
        if readers is not None:
            readers.shutdown()
        self._requests.close()

    def _reader(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(self._options.parts_in_flight, "ckptd-s3-read")
            return self._readers

    def _head(self, key: str) -> Mapping[str, Any]:
        try:
            return obstore.head(self._stores.engine, key)
        except ENGINE_ERRORS as error:
            raise self._failed("read", key, error) from error

    def _where(self, key: str) -> str:
        return self._place.show(key)

    def _failed(self, verb: str, key: str, error: Exception) -> CkptdError:
        chain = self._stores.chain
        if is_stale(error):
            self._stores.renew(chain)
        return translated(verb, self._where(key), error, chain.problem)

    def __repr__(self) -> str:
        """Return name and place, and no credentials."""
        return f"<ObstoreTier {self.url}>"


def _is_temporary(key: str) -> bool:
    return key.rpartition("/")[2].startswith(_TEMPORARY)


def _write_at(descriptor: int, chunk: bytes, at: int) -> None:
    view = memoryview(chunk)
    while view:
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count


def _all(futures: Sequence[Future[str | None]]) -> list[str | None]:
    """Return all results, or raise the first error, but never before the last one has stopped writing."""
    wait(futures, return_when=FIRST_EXCEPTION)
    for future in futures:
        future.cancel()
    wait(futures)
    for future in futures:
        if not future.cancelled() and (error := future.exception()) is not None:
            raise error
    return [future.result() for future in futures]
