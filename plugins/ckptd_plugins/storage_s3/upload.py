"""Large objects: sent in parts, several in flight, continuing what an earlier attempt has left on the server."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from ckptd.errors import NotFoundError, RefusedError, StoreError, invariant
from ckptd.storage import flight
from ckptd.storage.direct import AlignedBuffer
from ckptd.storage.stream import Buffers, Stream
from ckptd.storage.tier import Pace
from ckptd.storage.wrappers import Retrier, RetryPolicy
from ckptd_plugins.storage_s3 import parts
from ckptd_plugins.storage_s3.failures import UploadGoneError
from ckptd_plugins.storage_s3.options import Place, S3Options
from ckptd_plugins.storage_s3.parts import Part

Answer = dict[str, Any]
_CANDIDATES = 4


class Requests(Protocol):
    """A client of one bucket, of whatever library."""

    def call(self, method: str, what: str, where: str, **arguments: Any) -> Answer:
        """Make one request, named as in botocore; raises a `CkptdError` that says what failed where."""
        ...


@dataclass(frozen=True, slots=True)
class OpenUpload:
    """A multipart upload that is neither completed nor aborted."""

    key: str
    """As the bucket knows it."""
    id: str
    begun_at: datetime
    checksum: str


@dataclass(frozen=True, slots=True)
class Taken:
    """An upload that one put of ours is at, and no other."""

    id: str
    part_bytes: int
    there: dict[int, Part]
    """The parts that the server has of it, by their numbers."""


class Uploads:
    """The multipart uploads of one tier."""

    def __init__(self, client: Requests, place: Place, options: S3Options) -> None:
        self._client = client
        self._place = place
        self._options = options
        self._retrier = Retrier(RetryPolicy(first_delay_s=0.4, max_delay_s=5.0, deadline_s=options.timeout_s))
        self._lock = threading.Lock()
        self._ours: set[str] = set()

    def put(self, key: str, data: Stream, pace: Pace | None, *, create_only: bool) -> None:
        """Send an object in parts and complete it.

        A part that fails in passing is sent again by itself, since a put that begins anew reads and compares all that
        is there. One that ran out of time is not: a server that hangs would be waited for twice.

        What is sent stays on the server whatever fails: the next put of the key, by anybody, continues with it, and
        `sweep` removes what nobody has continued. Two that continue the same upload at once can't mix their bytes,
        since every part is named by ETag and checksum when the upload is completed. But both may be told that they have
        completed it, so a create-only put begins one of its own.
        """
        name, where = self._place.prefix + key, self._place.show(key)
        found = None if create_only else self._find(name, data.size_bytes)
        if found is not None:
            try:
                self._send(found, name, where, data, pace, create_only=create_only)
            except RefusedError:
                pass  # begun by another tool, in a way that does not take our checksums; or the next line will say why
            else:
                return
        self._send(self._begin(name, where, data.size_bytes), name, where, data, pace, create_only=create_only)

    def _send(self, taken: Taken, name: str, where: str, data: Stream, pace: Pace | None, *, create_only: bool) -> None:
        try:
            upload = _Upload(self._client, self._retrier, name, where, data, taken, pace)
            sent = upload.send(self._options.parts_in_flight)
            self._complete(taken.id, name, where, sent, create_only=create_only)
        finally:
            with self._lock:
                self._ours.discard(taken.id)

    def _complete(self, upload_id: str, name: str, where: str, sent: list[Part], *, create_only: bool) -> None:
        listed = [{"PartNumber": part.number, "ETag": part.etag, "ChecksumSHA256": part.sha256} for part in sent]
        answer = self._client.call(
            "complete_multipart_upload", "complete the upload of", where,
            Key=name, UploadId=upload_id, MultipartUpload={"Parts": listed},
            **({"IfNoneMatch": "*"} if create_only else {}),
        )  # fmt: skip
        _compare(answer, parts.sha256_of_parts(part.sha256 for part in sent), where)

    def abort(self, upload: OpenUpload) -> None:
        """Remove an upload and what it has on the server; one that is gone is no error."""
        with contextlib.suppress(UploadGoneError, NotFoundError):
            self._client.call(
                "abort_multipart_upload", "abort the upload of", f"s3://{self._place.bucket}/{upload.key}",
                Key=upload.key, UploadId=upload.id,
            )  # fmt: skip

    def open_uploads(self, prefix: str) -> Iterator[OpenUpload]:
        """Yield the uploads for keys that start with `prefix` that are open, whoever began them."""
        marker: Answer = {}
        while True:
            answer = self._client.call(
                "list_multipart_uploads", "list uploads to", self._place.show(prefix),
                Prefix=self._place.prefix + prefix, **marker,
            )  # fmt: skip
            for item in answer.get("Uploads", ()):
                yield OpenUpload(item["Key"], item["UploadId"], item["Initiated"], item.get("ChecksumAlgorithm", ""))
            marker = {
                name: answer[f"Next{name}"] for name in ("KeyMarker", "UploadIdMarker") if answer.get(f"Next{name}")
            }
            if not answer.get("IsTruncated") or not marker:
                return

    def _touched_at(self, upload: OpenUpload) -> datetime:
        """Return when an upload was last continued: it is as old as its newest part."""
        with contextlib.suppress(UploadGoneError, NotFoundError):
            times = [at for _, at in self._parts_of(upload.key, upload.id)]
            return max(upload.begun_at, *times) if times else upload.begun_at
        return upload.begun_at

    def drop(self, key: str) -> None:
        """Abort what was sent for a key that somebody else has created: no put will continue it."""
        with contextlib.suppress(StoreError):
            for upload in self.open_uploads(key):
                if upload.key == self._place.prefix + key and not self._is_ours(upload):
                    self.abort(upload)

    def sweep(self, prefix: str, before: datetime) -> list[str]:
        """Abort the uploads below a prefix that nobody has continued since; return what was removed, for people."""
        removed = []
        for upload in list(self.open_uploads(prefix)):
            if upload.begun_at > before or self._is_ours(upload) or self._touched_at(upload) > before:
                continue
            self.abort(upload)
            begun = f"{upload.begun_at.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
            removed.append(f"open upload of s3://{self._place.bucket}/{upload.key}, begun at {begun}")
        return removed

    def close(self) -> None:
        """Send no part again: who waits for that gets the error."""
        self._retrier.close()

    def _is_ours(self, upload: OpenUpload) -> bool:
        """Whether a put of this very tier is at it."""
        with self._lock:
            return upload.id in self._ours

    def _begin(self, name: str, where: str, size_bytes: int) -> Taken:
        answer = self._client.call("create_multipart_upload", "put", where, Key=name, ChecksumAlgorithm="SHA256")
        with self._lock:
            self._ours.add(answer["UploadId"])
        return Taken(answer["UploadId"], parts.part_bytes_for(size_bytes, self._options.part_bytes), {})

    def _find(self, name: str, size_bytes: int) -> Taken | None:
        """Take the open upload of a key that has most of it; None when there is none that can be continued."""
        try:
            found = [
                upload for upload in self.open_uploads(name.removeprefix(self._place.prefix)) if upload.key == name
            ]
        except RefusedError:
            return None  # who may put need not be allowed to list; if that is not it, the put will say so
        found = [upload for upload in found if upload.checksum in ("", "SHA256")]
        found.sort(key=lambda upload: upload.begun_at, reverse=True)
        usable: list[Taken] = []
        for upload in found[:_CANDIDATES]:
            try:
                there = {part.number: part for part, _ in self._parts_of(name, upload.id)}
            except (UploadGoneError, NotFoundError, RefusedError):
                continue
            part_bytes = parts.resumed_part_bytes(size_bytes, self._options.part_bytes, there.values())
            if part_bytes is not None:
                usable.append(Taken(upload.id, part_bytes, there))
        usable.sort(key=lambda taken: sum(part.size_bytes for part in taken.there.values()), reverse=True)
        with self._lock:
            for taken in usable:
                if taken.id not in self._ours:
                    self._ours.add(taken.id)
                    return taken
        return None

    def _parts_of(self, name: str, upload_id: str) -> Iterator[tuple[Part, datetime]]:
        marker: Answer = {}
        while True:
            answer = self._client.call(
                "list_parts", "list the parts of", f"s3://{self._place.bucket}/{name}",
                Key=name, UploadId=upload_id, **marker,
            )  # fmt: skip
            for item in answer.get("Parts", ()):
                part = Part(item["PartNumber"], item["Size"], item["ETag"], item.get("ChecksumSHA256", ""))
                yield part, item["LastModified"]
            if not answer.get("IsTruncated") or not answer.get("NextPartNumberMarker"):
                return
            marker = {"PartNumberMarker": answer["NextPartNumberMarker"]}


@dataclass(frozen=True, slots=True)
class _Upload:
    """One object on its way."""

    client: Requests
    retrier: Retrier
    name: str
    where: str
    data: Stream
    taken: Taken
    pace: Pace | None

    def send(self, threads: int) -> list[Part]:
        """Send what the server does not have yet; return all parts, in order."""
        part_bytes = self.taken.part_bytes
        count = parts.count_of(self.data.size_bytes, part_bytes)
        sent: dict[int, Part] = {}

        def prepare() -> Callable[[int], None]:
            room: AlignedBuffer | None = None

            def serve(number: int) -> None:
                nonlocal room
                begin, end = parts.range_of(number, self.data.size_bytes, part_bytes)
                data = self.data.view(begin, end) if isinstance(self.data, Buffers) else None
                if data is None:
                    if room is None:
                        room = AlignedBuffer(part_bytes)
                    data = room.view[: end - begin]
                    self.data.read_into(begin, data)
                sent[number] = self._send(number, data)

            return serve

        flight.run(range(1, count + 1), prepare, threads)
        invariant(len(sent) == count, "a part was left out")
        return [sent[number] for number in range(1, count + 1)]

    def _send(self, number: int, data: memoryview) -> Part:
        checksum = parts.sha256_of(data)
        known = self.taken.there.get(number)
        if known is not None and parts.is_same(known, data, checksum):
            return Part(number, len(data), known.etag, checksum)
        answer = self.retrier.call(f"part {number}", lambda: self._upload(number, data, checksum))
        if isinstance(answer, UploadGoneError):
            raise answer
        return Part(number, len(data), answer["ETag"], checksum)

    def _upload(self, number: int, data: memoryview, checksum: str) -> Answer | UploadGoneError:
        """Send a part; an upload that is gone is returned, since another put may help and another part can't."""
        if self.pace is not None:
            self.pace(len(data))
        try:
            answer = self.client.call(
                "upload_part", f"put part {number} of", self.where,
                Key=self.name, UploadId=self.taken.id, PartNumber=number, Body=data, ChecksumSHA256=checksum,
            )  # fmt: skip
        except UploadGoneError as gone:
            return gone
        _compare(answer, checksum, self.where)
        return answer


def _compare(answer: Answer, checksum: str, where: str) -> None:
    """Compare what the server says that it has with what was sent; not every server says it."""
    said = answer.get("ChecksumSHA256", checksum)
    if said != checksum:
        raise StoreError(f"can't put {where}: the server has other bytes than were sent")
