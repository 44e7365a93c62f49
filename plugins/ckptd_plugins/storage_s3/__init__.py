"""S3 and what speaks its protocol, as a tier: ``s3://bucket/prefix``, by way of s3fs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptd.errors import PluginError
from ckptd.storage.tier import Tier
from ckptd_plugins.storage_s3.options import Place, S3Options


def open_s3(url: str, options: Mapping[str, Any] | None = None) -> Tier:
    """Open the bucket, and the prefix in it, that an ``s3://`` URL names.

    s3fs is loaded here and not before: an agent whose jobs keep to disks does without its 100 modules.
    """
    place, chosen = Place.of(url), S3Options.of(options or {})
    try:
        from ckptd_plugins.storage_s3.tier import S3Tier  # noqa: PLC0415
    except ImportError as error:
        raise PluginError(f"{place.url} needs s3fs: {error}", hint="pip install 'ckptd[s3]'") from error
    return S3Tier(place, chosen)
