"""Digests of shards and tensors.

xxh3-128 reads memory at 12 GB/s where SHA-256 reads 1.5, and notices every damage that happens by accident. It is no
defence against a forger; who can write the store can write the manifest too.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

DIGEST_NAME = "xxh3-128"


StreamDigest = xxhash.xxh3_128
"""The same digest, fed piece by piece: `update(bytes)`, then `hexdigest()`."""


def digest(data: memoryview | bytes) -> str:
    """Return the digest of `data` in hex. Releases the GIL for more than a few KiB."""
    return xxhash.xxh3_128_hexdigest(data)


def shard_digest(header: bytes, tensor_digests: Iterable[str]) -> str:
    """Return the digest of a whole shard: of its header and its tensors' digests in file order.

    Header and tensors cover the file without holes, so this covers every byte and costs no second pass over them.
    """
    state = xxhash.xxh3_128(header)
    for part in tensor_digests:
        state.update(bytes.fromhex(part))
    return state.hexdigest()
