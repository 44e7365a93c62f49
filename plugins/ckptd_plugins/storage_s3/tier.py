"""The S3 tier: objects in a bucket, below a prefix.

Every put carries a checksum that the server compares, and create-only puts are decided by the server
(``If-None-Match``). Large objects go as multipart uploads that outlive whoever sends them. Nothing but a part of those
is sent again here.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

from ckptd.errors import DamagedError, FullError, NotFoundError, RefusedError
from ckptd.storage import flight
from ckptd.storage.stream import stream_of
from ckptd.storage.tier import Capabilities, Cost, Data, Entry, FailureGroup, Pace
from ckptd_plugins.storage_s3.client import Client
from ckptd_plugins.storage_s3.options import Place, S3Options
from ckptd_plugins.storage_s3.puts import Puts, check_create_only
from ckptd_plugins.storage_s3.upload import Answer

_RANGE_BYTES = 8 * 2**20
"""How much of a large object one request reads."""
_PROBE = ".ckptd-probe-"


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
        self._puts = Puts(self._client, place, options)
        weakref.finalize(self, self._client.close)  # at the end of the process at the latest

    def __repr__(self) -> str:
        return f"S3Tier({self.url!r})"

    @property
    def url(self) -> str:
        """The bucket and the prefix."""
        return self._place.url

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Send an object: in one request, or in parts when it is larger than one."""
        self._puts.put(key, stream_of(data), pace, create_only=create_only)

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
        removed = self._puts.sweep(prefix, older_than_s)
        before_s = time.time() - older_than_s
        for probe in list(self._list(_PROBE)):
            if probe.modified_at < before_s:
                self.delete(probe.key)
                removed.append(f"probe {self._place.show(probe.key)}")
        return removed

    def check_writable(self) -> None:
        """See that a probe can be put, and not twice."""
        check_create_only(self, f"{_PROBE}{os.urandom(8).hex()}")

    def hold(self, job: str, deadline_s: float) -> None:
        """Refuse: a bucket has no locks."""
        del deadline_s
        raise RefusedError(f"{self.url} has no locks that could keep other agents from job {job}")

    def close(self) -> None:
        """Close the connections and end the thread behind them."""
        self._puts.close()
        self._client.close()

    def _head(self, key: str) -> tuple[int, str]:
        answer = self._call("head_object", "read", key)
        return answer["ContentLength"], answer["ETag"]

    def _call(self, method: str, what: str, key: str, **arguments: object) -> Answer:
        return self._call_on(method, what, key, Key=self._place.prefix + key, **arguments)

    def _call_on(self, method: str, what: str, key: str, **arguments: object) -> Answer:
        return self._client.call(method, what, self._place.show(key), **arguments)
