"""Credentials from where every AWS program finds them: variables, profiles, SSO, roles of containers and instances."""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import botocore.session
from botocore.exceptions import BotoCoreError, ClientError

from ckptd.errors import RefusedError, StoreError
from ckptd_plugins.storage_s3.options import S3Options

if TYPE_CHECKING:
    from obstore.store import S3Credential

_KEPT_S = 600.0
"""How long the engine may use what it was given. botocore hands out nothing that expires sooner than that."""
_HINT = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile; `aws sts get-caller-identity` shows what is used"
)


class Chain:
    """The usual chain of one profile. It is walked when it is first needed, since it may ask a metadata service."""

    def __init__(self, options: S3Options) -> None:
        self._session: Any = botocore.session.Session(profile=options.profile or None)
        self._lock = threading.Lock()
        self._found: Any = None
        self.problem: StoreError | None = None
        """Why the last question had no answer: through the engine only a text would come."""
        found = os.environ.get
        self.endpoint: str | None = (
            options.endpoint
            or found("AWS_ENDPOINT_URL_S3")
            or found("AWS_ENDPOINT_URL")
            or self._configured("endpoint_url")
        )
        """The server: the option's, else the usual variables', else the profile's; None is AWS itself."""
        self.region: str | None = (
            options.region or found("AWS_REGION") or found("AWS_DEFAULT_REGION") or self._configured("region")
        )

    def __call__(self) -> S3Credential:
        """Return credentials that are good for a while; raises `RefusedError` when there are none."""
        try:
            with self._lock:
                self._found = self._found or self._session.get_credentials()
                frozen = None if self._found is None else self._found.get_frozen_credentials()
        except (BotoCoreError, ClientError) as error:
            self.problem = StoreError(f"can't get AWS credentials: {type(error).__name__}", hint=_HINT)
            raise self.problem from error
        if frozen is None or not frozen.access_key or not frozen.secret_key:
            self.problem = RefusedError("there are no AWS credentials", hint=_HINT)
            raise self.problem
        self.problem = None
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(seconds=_KEPT_S),
        }

    def _configured(self, name: str) -> str | None:
        """Return a setting of the profile, as `region` or `endpoint_url`."""
        try:
            value = self._session.get_scoped_config().get(name)
        except BotoCoreError as error:
            raise RefusedError(f"can't use the AWS profile: {error}", hint="see `aws configure list`") from error
        return str(value) if value else None

    def client(self, **options: Any) -> Any:
        """Return an S3 client of botocore's with these credentials."""
        return self._session.create_client("s3", **options)
