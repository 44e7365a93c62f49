"""The S3 tier: objects in a bucket, below a prefix.

Every put carries a checksum that the server compares, and create-only puts are decided by the server
(``If-None-Match``). Large objects go as multipart uploads that outlive whoever sends them. Nothing is retried here.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

from ckptd.errors import DamagedError, FencedError, FullError, NotFoundError, RefusedError, StoreError
from ckptd.storage import flight
from ckptd.storage.stream import Stream, piece, stream_of
from ckptd.storage.tier import Capabilities, Cost, Data, Entry, FailureGroup, Pace
from ckptd_plugins.storage_s3.client import Answer, Client
from ckptd_plugins.storage_s3.failures import ConflictError, UploadGoneError
from ckptd_plugins.storage_s3.options import Place, S3Options
from ckptd_plugins.storage_s3.parts import sha256_of
from ckptd_plugins.storage_s3.upload import Uploads

_RANGE_BYTES = 8 * 2**20
"""How much of a large object one request reads."""
_PROBE = ".ckptd-probe-"
_MARK = "ckptd-put"
"""The metadata by which a create-only put knows its own object."""


class S3Tier:
    """A bucket as a tier. Keys are put behind the prefix of the URL."""

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
        self._place = place
        self._options = options
        self._client = Client(place, options)
        self._uploads = Uploads(self._client, place, options)
        weakref.finalize(self, self._client.close)  # at the end of the process at the latest

    def __repr__(self) -> str:
        return f"S3Tier({self.url!r})"

    @property
    def url(self) -> str:
        """The bucket and the prefix."""
        return self._place.url

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Send an object: in one request, or in parts when it is larger than one."""
        stream = stream_of(data)
        try:
            if stream.size_bytes <= self._options.part_bytes:
                self._put_small(key, stream, pace, create_only=create_only)
            else:
                self._put_large(key, stream, pace, create_only=create_only)
        except ConflictError as error:
            if create_only and self._exists(key):
                raise FencedError(f"{self._place.show(key)} exists already") from error
            raise

    def _put_small(self, key: str, data: Stream, pace: Pace | None, *, create_only: bool) -> None:
        whole = piece(data, 0, data.size_bytes) if data.size_bytes else memoryview(b"")
        if pace is not None:
            pace(len(whole))
        checksum = sha256_of(whole)
        mark = os.urandom(16).hex()
        unless_there = {"IfNoneMatch": "*", "Metadata": {_MARK: mark}} if create_only else {}
        try:
            answer = self._call("put_object", "put", key, Body=whole, ChecksumSHA256=checksum, **unless_there)
        except FencedError:
            # The client sends a request again whose connection broke: the one in the way may be ours.
            if self._mark(key) != mark:
                raise
            return
        if answer.get("ChecksumSHA256", checksum) != checksum:
            raise StoreError(f"can't put {self._place.show(key)}: the server has other bytes than were sent")

    def _put_large(self, key: str, data: Stream, pace: Pace | None, *, create_only: bool) -> None:
        if create_only and self._exists(key):  # the server decides when all is sent, but then all is sent
            raise FencedError(f"{self._place.show(key)} exists already")
        try:
            self._uploads.put(key, data, pace, create_only=create_only)
        except FencedError:
            self._drop_uploads(key)
            raise
        except UploadGoneError as error:
            if create_only and self._exists(key):
                raise FencedError(f"{self._place.show(key)} exists already") from error
            raise

    def _drop_uploads(self, key: str) -> None:
        """Abort what was sent for a key that somebody else has created: no put will continue it."""
        with contextlib.suppress(StoreError):
            for upload in self._uploads.open_uploads(key):
                if upload.key == self._place.prefix + key and not self._uploads.is_ours(upload):
                    self._uploads.abort(upload)

    def get(self, key: str) -> bytes:
        """Return an object whole, compared with the checksum that it was put with."""
        return self._client.fetch(self._place.prefix + key, self._place.show(key))

    def size_bytes(self, key: str) -> int:
        """Return an object's size."""
        return self._head(key)[0]

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Read a range of an object; a large one in pieces, several at once, all of the same object."""
        if 0 < len(into) <= _RANGE_BYTES:
            self._client.fetch_into(self._place.prefix + key, self._place.show(key), offset, into.cast("B"))
            return
        size_bytes, etag = self._head(key)
        if offset + len(into) > size_bytes:
            where = self._place.show(key)
            raise DamagedError(f"{where} ends at byte {size_bytes}, {offset + len(into)} were wanted")
        self._read(key, etag, offset, into.cast("B"))

    def _read(self, key: str, etag: str, offset: int, into: memoryview) -> None:
        name, where = self._place.prefix + key, self._place.show(key)

        def prepare() -> Callable[[int], None]:
            def serve(begin: int) -> None:
                self._client.fetch_into(name, where, offset + begin, into[begin : begin + _RANGE_BYTES], etag)

            return serve

        flight.run(range(0, len(into), _RANGE_BYTES), prepare, self._options.parts_in_flight)

    def open(self, key: str) -> int:
        """Bring a copy of the object into a memory file and open that."""
        size_bytes, etag = self._head(key)
        try:
            writable = os.memfd_create("ckptd-object", os.MFD_CLOEXEC)
            try:
                if size_bytes:
                    os.posix_fallocate(writable, 0, size_bytes)  # or writing to it could end the process
                    # all pages at once: one by one they cost three times the processor of the whole download
                    memory = mmap.mmap(writable, size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
                    self._read(key, etag, 0, memoryview(memory))
                return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
            finally:
                os.close(writable)
        except OSError as error:
            said = f"no memory for the {size_bytes} bytes of {self._place.show(key)}: {error.strerror}"
            raise FullError(said, hint="fetch it to a local tier instead") from error

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects below a prefix, a page of up to 1,000 at a time."""
        return (entry for entry in self._list(prefix) if not entry.key.startswith(_PROBE))

    def _list(self, prefix: str) -> Iterator[Entry]:
        marker: Answer = {}
        skipped = len(self._place.prefix)
        while True:
            answer = self._call_on("list_objects_v2", "list", prefix, Prefix=self._place.prefix + prefix, **marker)
            for item in answer.get("Contents", ()):
                key = item["Key"][skipped:]
                if key:  # some tools keep an empty object where a folder would be
                    yield Entry(key, item["Size"], item["LastModified"].timestamp())
            if not answer.get("IsTruncated"):
                return
            marker = {"ContinuationToken": answer["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        """Remove an object."""
        with contextlib.suppress(NotFoundError):
            self._call("delete_object", "delete", key)

    def sweep(self, prefix: str, older_than_s: float) -> Sequence[str]:
        """Abort uploads that nobody has continued for so long, and remove probes."""
        before = datetime.fromtimestamp(time.time() - older_than_s, UTC)
        removed = []
        for upload in list(self._uploads.open_uploads(prefix)):
            if upload.begun_at > before or self._uploads.is_ours(upload) or self._uploads.touched_at(upload) > before:
                continue
            self._uploads.abort(upload)
            begun = f"{upload.begun_at.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
            removed.append(f"open upload of s3://{self._place.bucket}/{upload.key}, begun at {begun}")
        for probe in list(self._list(_PROBE)):
            if probe.modified_at < before.timestamp():
                self.delete(probe.key)
                removed.append(f"probe {self._place.show(probe.key)}")
        return removed

    def check_writable(self) -> None:
        """Put a probe, and see that a second one under its key is refused: claims depend on that; then remove it.

        Servers that take ``If-None-Match`` and overwrite all the same exist.
        """
        key = f"{_PROBE}{os.urandom(8).hex()}"
        self._put_small(key, stream_of(b"ckptd"), None, create_only=True)
        try:
            self._put_small(key, stream_of(b"again"), None, create_only=True)
        except FencedError:
            return
        finally:
            self.delete(key)
        raise RefusedError(
            f"{self.url} can't be used: its server overwrites what a create-only put must leave alone",
            hint="use a server that knows conditional writes (If-None-Match)",
        )

    def hold(self, job: str, deadline_s: float) -> None:
        """Refuse: a bucket has no locks."""
        del deadline_s
        raise RefusedError(f"{self.url} has no locks that could keep other agents from job {job}")

    def close(self) -> None:
        """Close the connections and end the thread behind them."""
        self._client.close()

    def _exists(self, key: str) -> bool:
        try:
            self._head(key)
        except NotFoundError:
            return False
        return True

    def _mark(self, key: str) -> str | None:
        with contextlib.suppress(NotFoundError, RefusedError):
            found: str | None = self._call("head_object", "read", key).get("Metadata", {}).get(_MARK)
            return found
        return None

    def _head(self, key: str) -> tuple[int, str]:
        answer = self._call("head_object", "read", key)
        return answer["ContentLength"], answer["ETag"]

    def _call(self, method: str, what: str, key: str, **arguments: object) -> Answer:
        return self._call_on(method, what, key, Key=self._place.prefix + key, **arguments)

    def _call_on(self, method: str, what: str, key: str, **arguments: object) -> Answer:
        return self._client.call(method, what, self._place.show(key), **arguments)
