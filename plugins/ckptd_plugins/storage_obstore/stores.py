"""The engine's handle of one bucket, and the credentials behind them, which may be looked for anew."""

from __future__ import annotations

import threading

from obstore.store import S3Store

from ckptd_plugins.storage_obstore import settings
from ckptd_plugins.storage_obstore.credentials import Chain
from ckptd_plugins.storage_s3.options import Place, S3Options


class Stores:
    """The handle of one bucket. Any thread may ask."""

    def __init__(self, place: Place, options: S3Options) -> None:
        self._place, self._options = place, options
        self._lock = threading.Lock()
        self._made = self._make(Chain(options))

    @property
    def engine(self) -> S3Store:
        """The bucket."""
        return self._made[0]

    @property
    def chain(self) -> Chain:
        """Where the credentials come from."""
        return self._made[1]

    def renew(self, refused: Chain) -> None:
        """Look for credentials anew with the next call: those that were refused may have been replaced since."""
        with self._lock:
            if self.chain is refused:
                self._made = self._make(Chain(self._options))

    def _make(self, chain: Chain) -> tuple[S3Store, Chain]:
        store = S3Store(
            self._place.bucket,
            prefix=self._place.prefix.rstrip("/") or None,
            config=settings.store(self._options, self._place.bucket, chain.endpoint, chain.region),
            credential_provider=None if self._options.anon else chain,
            client_options=settings.client(self._options, chain.endpoint),
            retry_config=settings.NO_RETRIES,
        )
        return store, chain
