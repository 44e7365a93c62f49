"""What filesystems of fsspec raise, and what becomes of it."""

from __future__ import annotations

import pytest

from ckptd.errors import FencedError, FullError, NotFoundError, RefusedError, StoreError
from ckptd_plugins.fsspec_failures import Secrets, translated


@pytest.mark.parametrize(
    ("error", "verb", "kind"),
    [
        (FileNotFoundError("x"), "read", NotFoundError),
        (FileNotFoundError("no bucket"), "put", RefusedError),
        (FileExistsError("x"), "put", FencedError),
        (PermissionError("denied"), "put", RefusedError),
        (OSError("Forbidden: bucket/x"), "read", RefusedError),
        (OSError(28, "No space left on device"), "put", FullError),
        (OSError(30, "Read-only file system"), "put", RefusedError),
        (NotImplementedError("no writing"), "put", RefusedError),
        (ConnectionResetError("reset"), "read", StoreError),
        (TimeoutError(), "list", StoreError),
        (RuntimeError("failed to upload block"), "put", StoreError),
        (KeyError("x"), "list", StoreError),
    ],
)
def test_errors_are_named_and_sorted(error: BaseException, verb: str, kind: type[Exception]) -> None:
    """What a filesystem raises becomes an error that says what and where, and whether a retry may help."""
    found = translated(error, verb, "gs://bucket/runs/job/a", Secrets({}))
    assert type(found) is kind
    assert "gs://bucket/runs/job/a" in found.message


def test_not_found_for_everything_is_seen_through() -> None:
    """A filesystem that says "not found" when its server failed is judged by the cause."""

    class StatusError(Exception):
        def __init__(self, status: int) -> None:
            super().__init__(f"status {status}")
            self.status = status

    wanted = {404: NotFoundError, 403: RefusedError, 503: StoreError}
    causes: list[tuple[BaseException, type[Exception]]] = [(StatusError(code), kind) for code, kind in wanted.items()]
    causes += [(ConnectionRefusedError("refused"), StoreError), (KeyError("x"), NotFoundError)]
    for cause, kind in causes:
        error = FileNotFoundError("x")
        error.__cause__ = cause
        assert type(translated(error, "read", "https://host/a", Secrets({}))) is kind, cause


def test_shows_no_secret() -> None:
    """Neither options nor what a library puts into its messages reaches an error of ours."""
    secrets = Secrets({"account_key": "s3cr3t-key", "sas_token": "sig-value", "account_name": "mine", "anon": True})
    error = OSError("https://user:pw@mine.blob/x?sig=abc&se=1 with s3cr3t-key, sig-value")
    said = translated(error, "read", "az://box/a", secrets).message
    for secret in ("s3cr3t-key", "sig-value", "sig=abc", "pw", "user"):
        assert secret not in said
    assert "mine.blob" in said
