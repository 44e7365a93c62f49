"""Which chunks of a checkpoint a rank needs, whatever world size wrote it."""

from __future__ import annotations

from ckptd.storage.boxes import Shape, intersect
from ckptd.storage.manifest import JOB, Chunk, StoredTensor


def own_chunk(tensor: StoredTensor, rank: int, world_size: int) -> Chunk:
    """Return the chunk that is `rank`'s of a tensor that each rank keeps for itself, as `chunks_for` says."""
    wanted = rank % world_size
    if wanted < len(tensor.chunks) and tensor.chunks[wanted].shard == wanted:
        return tensor.chunks[wanted]  # as it is wherever every rank has such a tensor
    return min(tensor.chunks, key=lambda chunk: (chunk.shard != wanted, chunk.shard))


def chunks_for(tensor: StoredTensor, rank: int, world_size: int, offset: Shape, shape: Shape) -> list[Chunk]:
    """Return the chunks that hold what `rank` needs of a tensor; `world_size` is that of the checkpoint.

    Of a tensor of the job these are all that share an element with its box. Of a tensor that each rank keeps for
    itself it is the one of rank `rank % world_size`, so a job that grew gives its new ranks what an old one had; where
    that one has no such tensor it is the one of the lowest rank that has it.
    """
    if tensor.placement == JOB:
        return [chunk for chunk in tensor.chunks if intersect(chunk.offset, chunk.shape, offset, shape) is not None]
    return [own_chunk(tensor, rank, world_size)]
