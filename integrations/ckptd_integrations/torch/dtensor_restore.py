"""New DTensors for state that does not exist yet, shared out among the ranks as one that does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def empty_like(like: DTensor, dtype: torch.dtype) -> DTensor:
    """Return a DTensor of `dtype` with the mesh, placements, global and local strides of `like`, not yet filled.

    Nothing is communicated: all ranks make the same one of the same `like`.
    """
    local = torch.empty_like(like.to_local(), dtype=dtype, requires_grad=False)
    return type(like).from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
