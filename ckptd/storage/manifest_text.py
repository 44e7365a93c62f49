"""The bytes of a manifest: JSON, encoded in short calls, whose last field is the digest of all that comes before it.

    {"format": 1, …, "complete": true, "document_digest": "xxh3-128 of every byte before the comma in front of it"}

A manifest vouches for every file, and without that field nothing would vouch for what no file tells: the name of a
tensor, a metric, the step that a generation began with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckptd.errors import DamagedError
from ckptd.storage.digest import digest, digest_of_parts

DIGEST_FIELD = "document_digest"
_LAST_BEFORE = "complete"
"""The last field of a manifest that was written before there were digests of them."""
to_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
"""The encoding of everything in a manifest."""


def encode(document: Mapping[str, Any]) -> bytes:
    """Return the bytes that are put as `manifest.json`; a digest in `document` is not kept but made anew."""
    return finish((body(document),))


def body(document: Mapping[str, Any]) -> bytes:
    """Return the text of a document but for its digest and its last brace, for `finish`."""
    fields = [f"{to_json(name)}:{_members(value)}" for name, value in document.items() if name != DIGEST_FIELD]
    return f"{{{','.join(fields)}".encode()


def finish(parts: tuple[bytes, ...]) -> bytes:
    """Return a whole manifest from the parts of its body, end to end."""
    return b"".join((*parts, _end(digest_of_parts(parts))))


def decode(data: bytes, where: str) -> Any:
    """Return what the bytes of a manifest say; raises `DamagedError` for what is not JSON, or not what was encoded."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f"the manifest {where} is not JSON", hint="the checkpoint is damaged: `ckptctl verify` names all such"
        ) from error
    if not isinstance(document, dict) or next(reversed(document), _LAST_BEFORE) == _LAST_BEFORE:
        return document
    cut = len(data) - len(_end("0" * 32))
    if cut < 0 or data[cut:] != _end(digest(memoryview(data)[:cut])):
        raise DamagedError(
            f"the manifest {where} is not what was committed (its own digest differs)",
            hint="`ckptctl verify --repair` takes the one of another tier",
        )
    return document


def _end(found: str) -> bytes:
    return f',"{DIGEST_FIELD}":"{found}"}}\n'.encode()


def _members(value: Any) -> str:
    """Encode an object member by member: one call for 10,000 tensors would keep other threads waiting for 60 ms."""
    if not isinstance(value, Mapping):
        return to_json(value)
    return f"{{{','.join([f'{to_json(name)}:{to_json(member)}' for name, member in value.items()])}}}"
