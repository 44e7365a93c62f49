"""Which chunk of a tensor that every rank keeps for itself a rank gets, whatever world size wrote the checkpoint."""

from __future__ import annotations

from ckptd.storage.manifest import Chunk, StoredTensor


def own_chunk(tensor: StoredTensor, rank: int, world_size: int) -> Chunk:
    """Return the chunk that `rank` restores of a tensor that each rank keeps for itself.

    It is the one of rank `rank % world_size`, where `world_size` is that of the checkpoint, so a job that grew gives
    its new ranks what an old one had; where that one has no such tensor it is the one of the lowest rank that has it.
    """
    wanted, chunks = rank % world_size, tensor.chunks
    if wanted < len(chunks) and chunks[wanted].shard == wanted:
        return chunks[wanted]  # where every rank has such a tensor
    return min(chunks, key=lambda chunk: (chunk.shard != wanted, chunk.shard))
