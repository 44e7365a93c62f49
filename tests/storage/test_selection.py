"""Which chunk a rank gets, for world sizes that are not the one that wrote the checkpoint."""

from __future__ import annotations

from ckptd.storage.manifest import RANK, Chunk, StoredTensor
from ckptd.storage.selection import own_chunk


def chunk(shard: int) -> Chunk:
    """A chunk of a shard."""
    return Chunk(shard, "t", "U8", (0,), (3,), f"rank-{shard}", 0, 3, None, ())


def test_a_rank_gets_the_chunk_of_its_place() -> None:
    """Rank r of a larger job gets what rank r modulo the old world size had; of a smaller one its own."""
    tensor = StoredTensor("t", RANK, (3,), (chunk(0), chunk(1)))
    assert [own_chunk(tensor, rank, 2).shard for rank in range(5)] == [0, 1, 0, 1, 0]


def test_a_rank_without_a_chunk_gets_the_lowest() -> None:
    """Where the shard in question has no such tensor, the lowest that has it serves."""
    tensor = StoredTensor("t", RANK, (3,), (chunk(3), chunk(1)))
    assert [own_chunk(tensor, rank, 4).shard for rank in range(4)] == [1, 1, 1, 3]
