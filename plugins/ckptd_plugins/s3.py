"""The plugin of ``s3://``: one contract over two engines, of which a job may choose.

obstore is the default: objects come down in 0.7 of the processor time of s3fs, and small ones go both ways in a sixth,
and that is time that training does not have (tests/bench/README.md). Large ones go up the same way over both: in parts,
with which a later put goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptd.errors import ConfigError
from ckptd.plugin import TierFactory, hookimpl
from ckptd.storage.tier import Tier
from ckptd_plugins.storage_obstore import open_obstore
from ckptd_plugins.storage_s3 import open_s3

ENGINES = {"obstore": open_obstore, "s3fs": open_s3}


def open_bucket(url: str, options: Mapping[str, Any]) -> Tier:
    """Open the bucket and prefix of an ``s3://`` URL over the engine that the options name."""
    rest = dict(options)
    engine = rest.pop("engine", "obstore")
    if engine not in ENGINES:
        raise ConfigError(f"there is no engine {engine!r} for s3://", hint=f"engines: {', '.join(ENGINES)}")
    return ENGINES[engine](url, rest)


@hookimpl
def ckptd_tiers() -> list[TierFactory]:
    """Register the tier of S3 and what speaks its protocol."""
    return [TierFactory("s3", ("s3",), open_bucket)]
