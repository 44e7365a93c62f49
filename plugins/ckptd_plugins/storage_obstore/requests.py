"""Requests that the engine can't make: uploads in parts. botocore makes them, which looks for credentials as well.

Over its connections 1 GiB goes up as fast as over the engine's, for as much processor time (tests/bench/README.md).
"""

from __future__ import annotations

import threading
from typing import Any

from botocore import UNSIGNED
from botocore.config import Config

from ckptd_plugins.storage_obstore.credentials import Chain
from ckptd_plugins.storage_obstore.stores import Stores
from ckptd_plugins.storage_s3.body import Body
from ckptd_plugins.storage_s3.failures import FROM_OUTSIDE, StaleError, explain
from ckptd_plugins.storage_s3.options import Place, S3Options
from ckptd_plugins.storage_s3.upload import Answer

_CONNECTIONS = 64


class Requests:
    """A client of one bucket, with the credentials of its `Stores`. Any thread may ask."""

    def __init__(self, stores: Stores, place: Place, options: S3Options) -> None:
        self._stores, self._place, self._options = stores, place, options
        self._lock = threading.Lock()
        self._made: tuple[Chain, Any] | None = None

    def call(self, method: str, what: str, where: str, **arguments: Any) -> Answer:
        """Make one request, named as in botocore; raises a `CkptdError` that says what failed where.

        It fails when nothing moves: an answer for `timeout_s`, what is sent for `connect_timeout_s`, by which urllib3
        measures that as well.
        """
        body = arguments.get("Body")
        if body is not None:
            arguments["Body"] = Body(body)
        chain = self._stores.chain
        try:
            client = self._client(chain)
            operation = client.meta.service_model.operation_model(client.meta.method_to_api_mapping[method])
            known = operation.input_shape.members
            along = {name: value for name, value in self._options.sent_along().items() if name in known}
            answer: Answer = getattr(client, method)(Bucket=self._place.bucket, **along, **arguments)
        except FROM_OUTSIDE as error:
            failed = explain(error, what, where)
            if isinstance(failed, StaleError):
                self._stores.renew(chain)
            raise failed from error
        return answer

    def close(self) -> None:
        """Close the connections that nobody uses."""
        with self._lock:
            made, self._made = self._made, None
        if made is not None:
            made[1].close()

    def _client(self, chain: Chain) -> Any:
        """Return the client of these credentials; making one takes 0.1 s, so it is made for the first large object."""
        with self._lock:
            if self._made is None or self._made[0] is not chain:
                self._made = (chain, self._make(chain))
            return self._made[1]

    def _make(self, chain: Chain) -> Any:
        options = self._options
        path = chain.endpoint is not None and options.addressing == "auto"
        config = Config(
            s3={"addressing_style": "path" if path else options.addressing, "payload_signing_enabled": False},
            connect_timeout=options.connect_timeout_s,
            read_timeout=options.timeout_s,
            retries={"total_max_attempts": 1},
            max_pool_connections=_CONNECTIONS,
            request_checksum_calculation="when_required",  # we send our own
            response_checksum_validation="when_required",
            signature_version=UNSIGNED if options.anon else None,
        )
        return chain.client(endpoint_url=chain.endpoint, region_name=chain.region, config=config)
