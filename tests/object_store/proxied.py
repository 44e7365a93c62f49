"""What tests of a store behind the faulty proxy share: the proxy, tiers over either engine, and a look behind it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import ClientError

from ckptd.errors import CkptdError
from ckptd.storage.tier import Tier
from ckptd.storage.wrappers import RetryingTier, RetryPolicy, VerifyingTier
from ckptd_plugins.s3 import open_bucket
from ckptd_plugins.storage_s3.options import Place
from tests.object_store.proxy import Proxy
from tests.object_store.server import Server

PART = 5 * 2**20
ENGINES = ("obstore", "s3fs")
TIMEOUT_S = 15.0
"""Long, for machines that are busy; where something has to time out the test says how soon."""


def proxy_of(server: Server) -> Proxy:
    """Start a proxy in front of a server."""
    address = urlsplit(server.endpoint)
    assert address.hostname is not None
    assert address.port is not None
    return Proxy((address.hostname, address.port))


def chosen(cases: Iterable[str], long: Collection[str]) -> list[Any]:
    """Return cases as parameters; those that are long belong to `make faults`."""
    return [pytest.param(case, marks=[pytest.mark.faults] if case in long else []) for case in cases]


@dataclass
class Bucket:
    """A place in a bucket, reached through the proxy by tiers, and directly to see what is really there."""

    proxy: Proxy
    place: Place
    engine: str
    client: Any
    """Of the server itself."""
    opened: list[Tier] = field(default_factory=list)
    retries: list[tuple[str, str]] = field(default_factory=list)
    """What was tried again, and why."""

    def tier(self, **options: Any) -> Tier:
        """Open the place as a plugin does, with the smallest parts and a short patience."""
        settings = {"engine": self.engine, "part_bytes": PART, "parts_in_flight": 2, "timeout": TIMEOUT_S, **options}
        tier = open_bucket(self.place.url, settings)
        self.opened.append(tier)
        return tier

    def agents(self, deadline_s: float = 5.0, **options: Any) -> Tier:
        """Open the place as an agent does: with retries, and a look at what was put."""

        def report(what: str, _: int, __: float, error: CkptdError) -> None:
            self.retries.append((what, str(error)))

        policy = RetryPolicy(deadline_s=deadline_s)
        return VerifyingTier(RetryingTier(self.tier(**options), policy, report=report), reads=False)

    def kept(self, key: str) -> bytes | None:
        """What lies under a key, None when nothing does."""
        try:
            answer = self.client.get_object(Bucket=self.place.bucket, Key=self.place.prefix + key)
        except ClientError as error:
            assert error.response["Error"]["Code"] == "NoSuchKey"
            return None
        body: bytes = answer["Body"].read()
        return body

    def open_uploads(self) -> list[str]:
        """The keys of multipart uploads that are neither completed nor ended."""
        found = self.client.list_multipart_uploads(Bucket=self.place.bucket, Prefix=self.place.prefix)
        return [item["Key"].removeprefix(self.place.prefix) for item in found.get("Uploads", ())]
