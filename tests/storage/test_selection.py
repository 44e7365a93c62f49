"""Which chunks a rank needs, for world sizes that are not the one that wrote the checkpoint."""

from __future__ import annotations

from ckptd.storage.manifest import JOB, RANK, Chunk, StoredTensor
from ckptd.storage.selection import chunks_for


def chunk(shard: int, offset: tuple[int, ...], shape: tuple[int, ...]) -> Chunk:
    """A chunk of a shard."""
    return Chunk(shard, "t", "U8", offset, shape, f"rank-{shard}", 0, 1, None, ())


def test_a_rank_gets_the_chunk_of_its_place() -> None:
    """Rank r of a larger job gets what rank r modulo the old world size had; of a smaller one its own."""
    tensor = StoredTensor("t", RANK, (3,), tuple(chunk(shard, (0,), (3,)) for shard in range(2)))
    found = [chunks_for(tensor, rank, 2, (0,), (3,)) for rank in range(5)]
    assert [[item.shard for item in chunks] for chunks in found] == [[0], [1], [0], [1], [0]]


def test_a_rank_without_a_chunk_gets_the_lowest() -> None:
    """Where the shard in question has no such tensor, the lowest that has it serves."""
    tensor = StoredTensor("t", RANK, (3,), (chunk(3, (0,), (3,)), chunk(1, (0,), (3,))))
    assert [chunks_for(tensor, rank, 4, (0,), (3,))[0].shard for rank in range(4)] == [1, 1, 1, 3]


def test_a_box_gets_all_that_it_meets() -> None:
    """Of a tensor of the job a rank gets each chunk that shares an element with its box, and no other."""
    rows = [chunk(at, (2 * at, 0), (2, 4)) for at in range(3)]
    tensor = StoredTensor("t", JOB, (6, 4), (*rows, chunk(3, (6, 0), (0, 4))))
    assert chunks_for(tensor, 0, 4, (0, 0), (6, 4)) == rows
    assert chunks_for(tensor, 0, 4, (1, 1), (2, 1)) == rows[:2]
    assert chunks_for(tensor, 0, 4, (4, 0), (1, 4)) == rows[2:]
    assert chunks_for(tensor, 0, 4, (6, 0), (0, 4)) == []
