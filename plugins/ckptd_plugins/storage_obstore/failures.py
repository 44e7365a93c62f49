"""The engine's errors as ours. Its texts name requests, answers and upload ids; of those only what helps is taken."""

from __future__ import annotations

import re

from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError

from ckptd.errors import CkptdError, DamagedError, FencedError, NotFoundError, RefusedError, StoreError

ENGINE_ERRORS = (BaseError, OSError, ValueError)
"""What the engine raises: its own family, `FileNotFoundError` and, for keys that it can't use, `ValueError`."""

_CODE = re.compile(r"<Code>([A-Za-z0-9.]+)</Code>")
_STATUS = re.compile(r"status code: (\d{3} ?[A-Za-z ]*)")
_KIND = re.compile(r"kind: (Timeout|Connect|Decode|Interrupted)")
_KEYS = "check the AWS credentials, and that the clock is right"
HINTS = {
    "NoSuchBucket": "create the bucket, or check its name, the region and the endpoint",
    "InvalidAccessKeyId": _KEYS,
    "SignatureDoesNotMatch": _KEYS,
    "ExpiredToken": "renew the AWS credentials",
    "InvalidToken": "renew the AWS credentials",
    "RequestTimeTooSkewed": "set the clock of this machine right",
    "AccessDenied": "the credentials need s3:GetObject, PutObject, DeleteObject, ListBucket and AbortMultipartUpload; "
    "to go on with interrupted uploads ListBucketMultipartUploads and ListMultipartUploadParts",
    "AllAccessDisabled": "ask who owns the bucket",
    "AccountProblem": "ask who owns the account",
    "PermanentRedirect": "set `region` to the bucket's",
    "AuthorizationHeaderMalformed": "set `region` to the bucket's",
    "InvalidBucketName": "check the name of the bucket",
    "InvalidStorageClass": "check `storage_class`",
    "KMS.NotFoundException": "check `sse_kms_key`",
    "KMS.DisabledException": "check `sse_kms_key`",
    "NotImplemented": "this server lacks what S3 has; see the options of the store",
}
"""Codes that no retry cures, and what does."""
_WORDS = {
    "Timeout": "no answer in time",
    "Connect": "can't connect",
    "Decode": "the answer broke off",
    "Interrupted": "the connection broke off",
}
STALE = ("ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "401", "403", "400")
"""Codes, and statuses of answers without one, of credentials that may have been replaced since they were read."""


def is_stale(error: Exception) -> bool:
    """Whether other credentials might have been let in."""
    text = str(error)
    return (_first(_CODE, text) or (_first(_STATUS, text) or "")[:3]) in STALE


def translated(verb: str, where: str, error: Exception, problem: StoreError | None) -> CkptdError:
    """Return the error that a failed call has to raise; `problem` is what kept it from getting credentials."""
    text = str(error)
    code = _first(_CODE, text)
    status = _first(_STATUS, text) or ""
    doing = f"can't {verb} {where}"
    if isinstance(error, UnauthenticatedError) and problem is not None:
        return type(problem)(f"{doing}: {problem.message}", hint=problem.hint)
    if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
        return NotFoundError(f"no object {where}")
    if isinstance(error, AlreadyExistsError):
        return FencedError(f"{where} exists already")
    if code == "ConditionalRequestConflict":
        return FencedError(f"{where} is being created by somebody else")
    if code == "InvalidRange" or status.startswith("416"):
        return DamagedError(f"{where} ends before the bytes that were wanted")
    if code in HINTS:
        return RefusedError(f"{doing}: {code}", hint=HINTS[code])
    if code is None and status.startswith("400"):  # an answer to HEAD has no body that could say more
        return RefusedError(f"{doing}: {status.strip()}", hint=_KEYS)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status[:3] in ("401", "403"):
        return RefusedError(f"{doing}: {code or status.strip() or 'no permission'}", hint=HINTS["AccessDenied"])
    if isinstance(error, ValueError):
        return RefusedError(f"{doing}: {text.partition(chr(10))[0]}", hint="keys are made of plain path segments")
    kind = _first(_KIND, text)
    reason = code or status.strip() or _WORDS.get(kind or "", kind) or type(error).__name__
    return StoreError(f"{doing}: {reason}", hint=None if code or status else "check the endpoint and the network")


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    return None if found is None else found[1]
