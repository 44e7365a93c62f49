"""The digest that a manifest has of itself: whatever is changed in one is noticed, and old ones are read as before."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import DamagedError
from ckptd.storage import catalog, keys, manifest
from ckptd.storage.manifest_text import body, decode, encode, finish
from ckptd.storage.memory import MemoryTier
from tests.storage.checkpoints import FIRST, JOB, MANIFEST, fill, good

_WHOLE = good()[MANIFEST]
_OLD = body(json.loads(_WHOLE)) + b"}\n"
"""The same manifest as it was written before manifests had a digest."""


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 8 * len(_WHOLE) - 1))
def test_every_bit_of_a_manifest_counts(at: int) -> None:
    """A flipped bit anywhere, in its digest and that one's name too, makes it one that can't be used."""
    data = bytearray(_WHOLE)
    data[at // 8] ^= 1 << at % 8
    with pytest.raises(DamagedError):
        manifest.parse(bytes(data), "here")


@pytest.mark.parametrize(
    ("was", "now"),
    [(b'"loss":0.25', b'"loss":0.35'), (b'"weight":', b'"weighs":'), (b'"created_at":1.5', b'"created_at":2.5')],
)
def test_what_no_file_tells_is_vouched_for(was: bytes, now: bytes) -> None:
    """A metric, a name or a time that is not what was committed is damage that `verify` names, whatever JSON says."""
    tier = fill(MemoryTier())
    assert was in _WHOLE
    tier.put(MANIFEST, _WHOLE.replace(was, now))
    (problem,) = catalog.verify(tier, JOB, FIRST)
    assert "its own digest differs" in problem


def test_one_without_a_digest_is_read_as_before() -> None:
    """Manifests of an older version stay readable, and what they say is the same but for the digest."""
    read = manifest.parse(_OLD, "here")
    assert read.tensors == manifest.parse(_WHOLE, "here").tensors
    tier = fill(MemoryTier())
    tier.put(keys.manifest_key(JOB, FIRST), _OLD)
    assert catalog.verify(tier, JOB, FIRST) == []


def test_a_reader_that_knows_only_json_needs_nothing_else() -> None:
    """The digest is one more field, the last one; all others are what they were."""
    document: dict[str, Any] = json.loads(_WHOLE)
    assert list(document)[-2:] == ["complete", "document_digest"]
    assert {**json.loads(_OLD), "document_digest": document["document_digest"]} == document


@pytest.mark.parametrize("edit", [{"job": "other"}, {"document_digest": "0" * 32}, {}])
def test_what_is_encoded_again_has_a_digest_of_its_own(edit: dict[str, str]) -> None:
    """A document that was read can be changed and encoded: the digest in it is made anew, and there is one."""
    document = {**json.loads(_WHOLE), **edit}
    made = encode(document)
    assert made.count(b"document_digest") == 1
    assert decode(made, "here")["job"] == document["job"]
    assert ("job" in edit) == (made != _WHOLE)


def test_parts_are_finished_as_one() -> None:
    """How a body is cut into parts makes no difference."""
    text = body(json.loads(_WHOLE))
    assert finish((text[:7], b"", text[7:1000], text[1000:])) == finish((text,)) == _WHOLE
