"""What the options of an S3 store are in the engine's words: pure functions."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from ckptd_plugins.storage_s3.options import S3Options

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config

NO_RETRIES: RetryConfig = {"max_retries": 0}
_IDLE_S = 15.0
"""How long an unused connection is kept: shorter than servers keep theirs, so that none is used as it is closed."""
_WHOLE_REQUEST_S = 3600.0


def store(options: S3Options, bucket: str, endpoint: str | None, region: str | None) -> S3Config:
    """Return the settings of a bucket; what is not named here is left to the AWS variables.

    Over http a signature covers the bytes too, as with other clients: nothing else keeps a third party from changing
    bytes and checksum together. Over https it would be CPU for nothing.
    """
    virtual = options.addressing == "virtual" or (
        options.addressing == "auto" and endpoint is None and "." not in bucket
    )  # AWS wants the bucket in the host's name, few others do
    config: S3Config = {
        "checksum_algorithm": "CRC64NVME",
        "unsigned_payload": not is_plain(endpoint),
        "skip_signature": options.anon,
        "request_payer": options.requester_pays,
        "virtual_hosted_style_request": virtual,
        "conditional_put": "etag",
        "disable_bulk_delete": True,
    }
    if endpoint is not None:
        config["endpoint"] = _with_bucket(endpoint, bucket) if virtual else endpoint
    if region is not None:
        config["region"] = region
    if options.sse:
        config["server_side_encryption"] = options.sse
    if options.sse_kms_key:
        config["sse_kms_key_id"] = options.sse_kms_key
    return config


def client(options: S3Options, endpoint: str | None) -> ClientConfig:
    """Return the settings of HTTP.

    The timeout of reading begins anew with each piece that comes. But it runs while a request is sent, too, and no
    piece that goes moves it; what is put by the engine is small enough for that.
    """
    return {
        "allow_http": is_plain(endpoint),
        "connect_timeout": timedelta(seconds=options.connect_timeout_s),
        "read_timeout": timedelta(seconds=options.timeout_s),
        "timeout": timedelta(seconds=_WHOLE_REQUEST_S),
        "pool_idle_timeout": timedelta(seconds=_IDLE_S),
    }


def is_plain(endpoint: str | None) -> bool:
    """Return whether bytes go over http: for who names it in the endpoint, and nobody else."""
    return endpoint is not None and endpoint.startswith("http://")


def _with_bucket(endpoint: str, bucket: str) -> str:
    parts = urlsplit(endpoint)
    return urlunsplit(parts._replace(netloc=f"{bucket}.{parts.netloc}"))
