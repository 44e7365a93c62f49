"""What killed puts have left in a bucket: open multipart uploads, which cost money until somebody ends them.

The engine can neither list nor end them, so botocore does, which is there for the credentials anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from ckptd.errors import RefusedError, StoreError
from ckptd_plugins.storage_obstore.credentials import Chain
from ckptd_plugins.storage_obstore.failures import HINTS
from ckptd_plugins.storage_s3.options import Place, S3Options

_GONE = "NoSuchUpload"


def end_uploads(chain: Chain, options: S3Options, place: Place, prefix: str, older_than_s: float) -> list[str]:
    """End the open uploads below a prefix that are older; return which."""
    ended = []
    before = datetime.now(UTC) - timedelta(seconds=older_than_s)
    payer = {"RequestPayer": "requester"} if options.requester_pays else {}
    try:
        client = _client(chain, options)
        try:
            for key, upload, begun in list(_open(client, Bucket=place.bucket, Prefix=place.prefix + prefix, **payer)):
                if begun <= before and _end(client, Bucket=place.bucket, Key=key, UploadId=upload, **payer):
                    ended.append(f"s3://{place.bucket}/{key}")
        finally:
            client.close()
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "unknown")
        kind = RefusedError if code in HINTS else StoreError
        raise kind(f"can't end uploads in {place.show(prefix)}: {code}", hint=HINTS.get(code)) from error
    except NoCredentialsError as error:
        raise RefusedError(f"can't end uploads in {place.show(prefix)}: no credentials") from error
    except BotoCoreError as error:
        raise StoreError(f"can't end uploads in {place.show(prefix)}: {type(error).__name__}") from error
    return ended


def _client(chain: Chain, options: S3Options) -> Any:
    path = chain.endpoint is not None and options.addressing == "auto"
    config = Config(
        s3={"addressing_style": "path" if path else options.addressing},
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.timeout_s,
        retries={"total_max_attempts": 1},
        signature_version=UNSIGNED if options.anon else None,
    )
    return chain.client(endpoint_url=chain.endpoint, region_name=chain.region, config=config)


def _open(client: Any, **where: str) -> Iterator[tuple[str, str, datetime]]:
    for page in client.get_paginator("list_multipart_uploads").paginate(**where):
        for upload in page.get("Uploads", ()):
            yield upload["Key"], upload["UploadId"], upload["Initiated"]


def _end(client: Any, **upload: str) -> bool:
    try:
        client.abort_multipart_upload(**upload)
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") != _GONE:
            raise
        return False
    return True
