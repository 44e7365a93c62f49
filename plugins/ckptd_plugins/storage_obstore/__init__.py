"""S3 over obstore, an engine written in Rust: little processor time for small objects and for all that is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptd.errors import PluginError
from ckptd.storage.tier import Tier
from ckptd_plugins.storage_s3.options import Place, S3Options


def open_obstore(url: str, options: Mapping[str, Any] | None = None) -> Tier:
    """Open the bucket, and the prefix in it, that an ``s3://`` URL names; nothing is sent before the first call.

    The options are those of the tier over s3fs, so that a store means the same over either engine.
    """
    place, chosen = Place.of(url), S3Options.of(options or {})
    try:
        from ckptd_plugins.storage_obstore.tier import ObstoreTier  # noqa: PLC0415
    except ImportError as error:
        raise PluginError(f"{place.url} needs obstore: {error}", hint="pip install 'ckptd[s3]'") from error
    return ObstoreTier(place, chosen)
