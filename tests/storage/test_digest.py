"""Digests: fixed values, the same by piece, and different for every kind of damage."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ckptd.storage.digest import DIGEST_NAME, LEAF_BYTES, TensorDigest, digest, of_leaves, shard_digest, tensor_digest


def test_known_values() -> None:
    """The digest is xxh3-128 of the reference implementation: manifests written today are verifiable for ever."""
    assert DIGEST_NAME == "xxh3-128"
    assert digest(b"") == "99aa06d3014798d86001c324468d497f"
    assert digest(memoryview(b"ckptd")) == digest(b"ckptd")
    assert len(digest(b"ckptd")) == 32


def test_a_small_tensor_is_one_leaf() -> None:
    """A tensor of up to one leaf has the digest of its bytes, so that any tool can check it, and no list of leaves."""
    assert tensor_digest(memoryview(b"")) == TensorDigest(digest(b""))
    assert tensor_digest(memoryview(b"ckptd")) == TensorDigest(digest(b"ckptd"))
    whole = memoryview(bytes(LEAF_BYTES))
    assert tensor_digest(whole) == TensorDigest(digest(whole))


@pytest.mark.parametrize("more", [1, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1])
def test_a_large_tensor_is_digested_by_leaf(more: int) -> None:
    """Leaves are of one size but for the last, each has its own digest, and the tensor's is that of those."""
    data = memoryview(bytes(range(256)) * ((LEAF_BYTES + more) // 256 + 1))[: LEAF_BYTES + more]
    found = tensor_digest(data)
    parts = [data[at : at + LEAF_BYTES] for at in range(0, len(data), LEAF_BYTES)]
    assert found == of_leaves(digest(part) for part in parts)
    assert found.leaves == tuple(digest(part) for part in parts)
    assert found.value == digest(b"".join(bytes.fromhex(leaf) for leaf in found.leaves))


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=2000), st.integers(0), st.integers(0, 7))
def test_a_flipped_bit_shows(data: bytes, at: int, bit: int) -> None:
    """One flipped bit anywhere changes the digest."""
    spoiled = bytearray(data)
    spoiled[at % len(data)] ^= 1 << bit
    assert digest(bytes(spoiled)) != digest(data)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=100), st.lists(st.binary(max_size=20), min_size=1, max_size=6), st.data())
def test_a_shard_digest_covers_header_and_order(header: bytes, tensors: list[bytes], data: st.DataObject) -> None:
    """The digest of a shard changes with its header, with any tensor and with their order."""
    digests = [digest(tensor) for tensor in tensors]
    whole = shard_digest(header, digests)
    assert shard_digest(header + b" ", digests) != whole
    assert shard_digest(header, [*digests, digest(b"")]) != whole
    shuffled = data.draw(st.permutations(digests))
    assume(shuffled != digests)
    assert shard_digest(header, shuffled) != whole
