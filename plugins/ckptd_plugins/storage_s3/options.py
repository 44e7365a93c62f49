"""Where an S3 tier is and how it is used: a URL and options, neither of which ever holds a credential."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from ckptd.errors import ConfigError
from ckptd.units import parse_duration, parse_size
from ckptd_plugins.storage_s3.parts import MAX_PART_BYTES, MIN_PART_BYTES

_ADDRESSING = ("auto", "path", "virtual")
_SSE = ("AES256", "aws:kms", "aws:kms:dsse")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_SECRET = re.compile(r"secret|token|password|access_?key|credential|^key$|^user")
_CHAIN = "credentials come from the environment, a profile in ~/.aws or the machine's role, never from here"


@dataclass(frozen=True, slots=True)
class Place:
    """A bucket and a prefix in it."""

    bucket: str
    prefix: str
    """What all keys of the tier begin with: empty, or with a slash at its end."""

    @classmethod
    def of(cls, url: str) -> Place:
        """Return what ``s3://bucket/prefix`` names; one with credentials is refused without being shown."""
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ConfigError("an s3:// URL holds more than a bucket and a prefix", hint=_CHAIN)
        if not _BUCKET.fullmatch(parts.netloc):
            raise ConfigError(f"{url} names no bucket", hint="write it like s3://bucket/prefix")
        prefix = parts.path.strip("/")
        if any(part in ("", ".", "..") for part in prefix.split("/")) and prefix:
            raise ConfigError(
                f"the prefix of {url} has an empty part, or one of dots", hint="like s3://bucket/team/runs"
            )
        return cls(parts.netloc, f"{prefix}/" if prefix else "")

    @property
    def url(self) -> str:
        """The place as logs show it."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def show(self, key: str) -> str:
        """Return an object, or a prefix of keys, as logs show it."""
        return f"s3://{self.bucket}/{self.prefix}{key}"


@dataclass(frozen=True, slots=True)
class S3Options:
    """What can be chosen for an S3 tier. Credentials can't: they come from the usual chain."""

    endpoint: str = ""
    """Where the server is, when it is not AWS and ``AWS_ENDPOINT_URL`` does not say it."""
    region: str = ""
    profile: str = ""
    """Whose credentials and settings in ``~/.aws`` are used."""
    anon: bool = False
    """Unsigned requests, for buckets that anybody may read."""
    addressing: str = "auto"
    """Whether the bucket stands in the host's name or in the path: "auto", "path" or "virtual"."""
    sse: str = ""
    """How the server encrypts what it keeps: "AES256", "aws:kms" or "aws:kms:dsse"; empty: as the bucket says."""
    sse_kms_key: str = ""
    storage_class: str = ""
    requester_pays: bool = False
    part_bytes: int = 16 * 2**20
    """How much of a large object one request sends; more, where 10,000 parts would not suffice."""
    parts_in_flight: int = 4
    connect_timeout_s: float = 5.0
    timeout_s: float = 30.0
    """How long a request may stand still, in either direction, before it is given up."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> S3Options:
        """Return the options that a table names; raises `ConfigError` for what is unknown or can't be meant."""
        settings: dict[str, Any] = {}
        for name, value in given.items():
            known = (
                name.removesuffix("_s") + "_s" if name.removesuffix("_s") in ("timeout", "connect_timeout") else name
            )
            if known not in _READ:
                raise _unknown(name)
            settings[known] = _READ[known](name, value)
        options = cls(**settings)
        if options.sse_kms_key and not options.sse.startswith("aws:kms"):
            raise ConfigError("sse_kms_key is given without sse", hint='add sse = "aws:kms"')
        if options.anon and options.profile:
            raise ConfigError("anon and profile can't both be meant", hint="leave one of them out")
        return options

    def sent_along(self) -> dict[str, str]:
        """Return what goes with each request that knows it, in the words of S3."""
        words = {
            "ServerSideEncryption": self.sse,
            "SSEKMSKeyId": self.sse_kms_key,
            "StorageClass": self.storage_class,
            "RequestPayer": "requester" if self.requester_pays else "",
        }
        return {name: value for name, value in words.items() if value}


def _unknown(name: str) -> ConfigError:
    if _SECRET.search(name.lower()):
        return ConfigError(f"an S3 store takes no {name!r}", hint=_CHAIN)
    near = difflib.get_close_matches(name, _READ, n=1)
    hint = f"is {near[0]} meant?" if near else f"it has {', '.join(sorted(_READ))}"
    return ConfigError(f"an S3 store has no option {name!r}", hint=hint)


def _read_text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip() or any(not character.isprintable() for character in value):
        raise ConfigError(f"{name} of an S3 store must be a word", hint=f'like {name} = "…"')
    return value


def _read_flag(name: str, value: object) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ConfigError(f"{name} of an S3 store must be true or false, not {value!r}", hint=f"like {name} = true")
    return value


def _read_one_of(choices: tuple[str, ...]) -> Callable[[str, object], str]:
    def read(name: str, value: object) -> str:
        if value not in choices:
            raise ConfigError(f"{name} of an S3 store can't be {value!r}", hint=f"it is one of {', '.join(choices)}")
        return str(value)

    return read


def _read_endpoint(name: str, value: object) -> str:
    parts = urlsplit(_read_text(name, value))
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError("the endpoint of an S3 store holds more than a host", hint=_CHAIN)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"the endpoint {value!r} of an S3 store is no URL", hint="like https://s3.example.com")
    return str(value)


def _read_part_bytes(name: str, value: object) -> int:
    size_bytes = parse_size(str(value), name)
    if not MIN_PART_BYTES <= size_bytes <= MAX_PART_BYTES:
        raise ConfigError(f"{name} of an S3 store can't be {value!r}", hint="S3 takes parts of 5MiB to 5GiB")
    return size_bytes


def _read_count(name: str, value: object) -> int:
    text = "" if isinstance(value, bool) else str(value)
    if not re.fullmatch(r"[1-9]\d?", text):
        raise ConfigError(
            f"{name} of an S3 store must be a number from 1 to 99, not {value!r}", hint=f"like {name} = 4"
        )
    return int(text)


def _read_seconds(name: str, value: object) -> float:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return parse_duration(f"{value}s" if plain else str(value), name)


_READ: dict[str, Callable[[str, object], Any]] = {
    **{field.name: _read_text for field in fields(S3Options)},
    "anon": _read_flag,
    "requester_pays": _read_flag,
    "endpoint": _read_endpoint,
    "addressing": _read_one_of(_ADDRESSING),
    "sse": _read_one_of(_SSE),
    "part_bytes": _read_part_bytes,
    "parts_in_flight": _read_count,
    "connect_timeout_s": _read_seconds,
    "timeout_s": _read_seconds,
}
