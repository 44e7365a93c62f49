"""What is put into a bucket, over any client: whole or in parts, each with a checksum that the server compares.

Signatures do not cover the bytes. They cover the SHA-256 that travels with them, which comes to the same: whoever
changes bytes on their way, over plain http too, can't change the checksum with them. So the bytes are read once for
both, which saves a third of the processor time of an upload. The list of parts that completes one is not covered: where
somebody may be in between, use https.
"""

from __future__ import annotations

import contextlib
import os
import time
from datetime import UTC, datetime

from ckptd.errors import FencedError, NotFoundError, RefusedError, StoreError
from ckptd.storage.stream import Stream, piece
from ckptd.storage.tier import Pace, Tier
from ckptd_plugins.storage_s3.failures import ConflictError, UploadGoneError
from ckptd_plugins.storage_s3.options import Place, S3Options
from ckptd_plugins.storage_s3.parts import sha256_of
from ckptd_plugins.storage_s3.upload import Requests, Uploads

_CREATED_WHOLE_BYTES = 64 * 2**20
"""Far more than a manifest has; claims and manifests are all that is ever created like this."""
_MARK = "ckptd-put"
"""The metadata by which a create-only put knows its own object."""


class Puts:
    """The puts of one tier."""

    def __init__(self, client: Requests, place: Place, options: S3Options) -> None:
        self._client, self._place, self._options = client, place, options
        self._uploads = Uploads(client, place, options)

    def put(self, key: str, data: Stream, pace: Pace | None, *, create_only: bool) -> None:
        """Send an object: in one request, or in parts when it is larger than one.

        What must not overwrite goes in one request as far as that can be. There are servers (SeaweedFS 4.48) that
        decide for one winner among such requests, and let several win that complete an upload at the same moment.
        """
        if create_only and data.size_bytes > self._options.part_bytes and self._exists(key):
            raise FencedError(f"{self._place.show(key)} exists already")  # the server says so when all is sent
        whole_bytes = max(self._options.part_bytes, _CREATED_WHOLE_BYTES) if create_only else self._options.part_bytes
        small = data.size_bytes <= whole_bytes
        try:
            (self._put_small if small else self._put_large)(key, data, pace, create_only=create_only)
        except ConflictError as error:
            if create_only and self._exists(key):
                raise FencedError(f"{self._place.show(key)} exists already") from error
            raise

    def sweep(self, prefix: str, older_than_s: float) -> list[str]:
        """Abort uploads that nobody has continued for so long; return what was removed, for people."""
        return self._uploads.sweep(prefix, datetime.fromtimestamp(time.time() - older_than_s, UTC))

    def close(self) -> None:
        """Try nothing again from now on."""
        self._uploads.close()

    def _put_small(self, key: str, data: Stream, pace: Pace | None, *, create_only: bool) -> None:
        whole = piece(data, 0, data.size_bytes) if data.size_bytes else memoryview(b"")
        if pace is not None:
            pace(len(whole))
        checksum = sha256_of(whole)
        mark = os.urandom(16).hex()
        unless_there = {"IfNoneMatch": "*", "Metadata": {_MARK: mark}} if create_only else {}
        try:
            answer = self._client.call(
                "put_object", "put", self._place.show(key),
                Key=self._place.prefix + key, Body=whole, ChecksumSHA256=checksum, **unless_there,
            )  # fmt: skip
        except FencedError:
            # The client sends a request again whose connection broke: the one in the way may be ours.
            if self._mark(key) != mark:
                raise
            return
        if answer.get("ChecksumSHA256", checksum) != checksum:
            raise StoreError(f"can't put {self._place.show(key)}: the server has other bytes than were sent")

    def _put_large(self, key: str, data: Stream, pace: Pace | None, *, create_only: bool) -> None:
        try:
            self._uploads.put(key, data, pace, create_only=create_only)
        except FencedError:
            self._uploads.drop(key)
            raise
        except UploadGoneError as error:
            if create_only and self._exists(key):
                raise FencedError(f"{self._place.show(key)} exists already") from error
            raise

    def _exists(self, key: str) -> bool:
        try:
            self._client.call("head_object", "read", self._place.show(key), Key=self._place.prefix + key)
        except NotFoundError:
            return False
        return True

    def _mark(self, key: str) -> str | None:
        with contextlib.suppress(NotFoundError, RefusedError):
            answer = self._client.call("head_object", "read", self._place.show(key), Key=self._place.prefix + key)
            found: str | None = answer.get("Metadata", {}).get(_MARK)
            return found
        return None


def check_create_only(tier: Tier, key: str) -> None:
    """Put a probe, see that a second one under its key is refused, and remove it; raises `RefusedError` if it is not.

    Claims depend on that, and servers that take ``If-None-Match`` and overwrite all the same exist.
    """
    tier.put(key, b"ckptd", create_only=True)
    try:
        tier.put(key, b"again", create_only=True)
    except FencedError:
        return
    finally:
        tier.delete(key)
    raise RefusedError(
        f"{tier.url} can't be used: its server overwrites what a create-only put must leave alone",
        hint="use a server that knows conditional writes (If-None-Match)",
    )
