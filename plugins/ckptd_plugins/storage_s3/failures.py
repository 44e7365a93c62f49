"""What went wrong, in ckptd's words: the errors of S3, botocore and s3fs as those of the tier contract.

Only codes and names of errors are quoted, and messages of the server where they are not about credentials. What
botocore says itself holds whole URLs and is left in the chain of causes.
"""

from __future__ import annotations

from botocore import exceptions as boto

from ckptd.errors import CkptdError, DamagedError, FencedError, FullError, NotFoundError, RefusedError, StoreError

_SHOWN_CHARACTERS = 200
_MISSING = {"NoSuchKey", "NoSuchVersion", "NotFound", "404"}
_PRECONDITION = {"PreconditionFailed", "412"}
_CONFLICT = {"ConditionalRequestConflict", "OperationAborted", "409"}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity", "507"}
_PASSES = {
    "BadDigest", "IncompleteBody", "InvalidPart", "RequestTimeout", "Throttling", "TooManyRequests",
    "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "InvalidDigest",
}  # fmt: skip
"""Answered with 4xx, and yet another try may go well."""
_CREDENTIALS = "check the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the profile, or the machine's role"
_HINTS = {
    "AccessDenied": "the credentials are known, but not allowed this: see the policy of the bucket and of their owner",
    "AllAccessDisabled": "the bucket is closed",
    "400": "see the credentials and the clock: an answer to HEAD says no more",
    "403": "see the credentials, and the policy of the bucket",
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "ExpiredToken": "the session has ended: get new credentials, or use a profile or role that renews them",
    "TokenRefreshRequired": "the session has ended: get new credentials, or use a profile or role that renews them",
    "RequestTimeTooSkewed": "the clock of this machine is wrong",
    "NoSuchBucket": "make the bucket, or use another --store",
    "PermanentRedirect": "the bucket is in another region: set AWS_DEFAULT_REGION, or the region of the store",
    "AuthorizationHeaderMalformed": "the bucket may be in another region: set the region of the store",
    "IllegalLocationConstraintException": "the bucket is in another region: set the region of the store",
    "SlowDown": "the server asks for fewer requests",
    "NotImplemented": "the server does not know this part of S3",
}
_QUIET = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"}
_BARE = {"400", "401", "403"}
"""What is left of an answer to HEAD, which has no body that could say more."""
_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.ProfileNotFound,
    boto.TokenRetrievalError,
)
_MISUSE = (
    boto.NoRegionError,
    boto.ParamValidationError,
    boto.ConfigParseError,
    boto.ConfigNotFound,
    boto.DataNotFoundError,
)
FROM_OUTSIDE = (OSError, boto.BotoCoreError, boto.ClientError)
"""The errors of network, server and the libraries in between; whatever else comes out of them is a bug."""
_TIMEOUTS = (TimeoutError, boto.ReadTimeoutError, boto.ConnectTimeoutError)


class UploadGoneError(StoreError):
    """Raised when a multipart upload was completed or aborted by somebody else meanwhile."""


class StaleError(RefusedError):
    """Raised when the credentials were not accepted, which others may be that have been put in their place."""


class ConflictError(StoreError):
    """Raised when another request for the same key was under way and the server would not decide."""


class ReplacedError(StoreError):
    """Raised when an object was put anew while its pieces were read."""


def explain(error: BaseException, what: str, where: str) -> CkptdError:
    """Return the error to raise for one that came out of s3fs while we tried to `what`, like "read", at `where`."""
    said = f"can't {what} {where}"
    answer = _answer_of(error)
    if answer is not None:
        return _explain_answer(answer, said, where)
    if isinstance(error, _NO_CREDENTIALS):
        return RefusedError(f"{said}: no usable credentials ({type(error).__name__})", hint=_CREDENTIALS)
    if isinstance(error, _MISUSE):
        return RefusedError(f"{said}: {type(error).__name__}", hint="see the options of the store and ~/.aws/config")
    if isinstance(error, boto.FlexibleChecksumError):
        return StoreError(f"{said}: the bytes have changed on their way")
    if isinstance(error, _TIMEOUTS) or _stood_still(error):
        return StoreError(f"{said}: the server does not answer in time", hint="is it up, and the network?")
    if isinstance(error, boto.EndpointConnectionError):
        return StoreError(f"{said}: the server can't be reached", hint="is it up, and the endpoint right?")
    return StoreError(f"{said}: the connection failed ({type(error).__name__})")


def _stood_still(error: BaseException) -> bool:
    """Whether a request ran out of time while it was sent, which botocore calls a closed connection."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, TimeoutError):
        found = found.__cause__ or found.__context__
    return found is not None


def _answer_of(error: BaseException) -> boto.ClientError | None:
    """Return the server's answer that an exception stands for; s3fs hides it behind an `OSError` of some number."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, boto.ClientError):
        found = found.__cause__
    return found


def _explain_answer(answer: boto.ClientError, said: str, where: str) -> CkptdError:
    code = str(answer.response.get("Error", {}).get("Code", "")) or "unknown"
    status = int(answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _MISSING:
        return NotFoundError(f"no object {where}")
    if code in _PRECONDITION:
        return FencedError(f"{where} exists already")
    if code == "InvalidRange":
        return DamagedError(f"{where} ends before the bytes that were wanted")
    message = f"{said}: {_shown(answer, code)}"
    hint = _HINTS.get(code)
    if code == "NoSuchUpload":
        return UploadGoneError(message, hint="somebody else has completed or aborted this upload")
    if code in _CONFLICT:
        return ConflictError(message, hint="another request for this key was under way")
    if code in _FULL or status == 507:
        return FullError(message, hint="free some space, lower keep_last, or use another --store")
    if code in _PASSES or status in (0, 408, 409, 425, 429) or (status >= 500 and status != 501):
        return StoreError(message, hint=hint)
    kind = StaleError if code in _QUIET or code in _BARE else RefusedError
    return kind(message, hint=hint)


def _shown(answer: boto.ClientError, code: str) -> str:
    text = " ".join(str(answer.response.get("Error", {}).get("Message", "")).split())[:_SHOWN_CHARACTERS]
    return code if code in _QUIET or not text else f"{code}, {text}"
