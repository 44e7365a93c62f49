"""Digests: fixed values, the same by piece, and different for every kind of damage."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ckptd.storage.digest import DIGEST_NAME, StreamDigest, digest, shard_digest


def test_known_values() -> None:
    """The digest is xxh3-128 of the reference implementation: manifests written today are verifiable for ever."""
    assert DIGEST_NAME == "xxh3-128"
    assert digest(b"") == "99aa06d3014798d86001c324468d497f"
    assert digest(memoryview(b"ckptd")) == digest(b"ckptd")
    assert len(digest(b"ckptd")) == 32


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=8))
def test_piece_by_piece_is_the_same(pieces: list[bytes]) -> None:
    """Verification reads in blocks and gets the digest of the whole."""
    state = StreamDigest()
    for piece in pieces:
        state.update(piece)
    assert state.hexdigest() == digest(b"".join(pieces))


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
