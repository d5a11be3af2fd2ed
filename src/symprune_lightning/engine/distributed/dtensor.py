"""Helpers for weights that may be DTensors (FSDP2, tensor parallel)."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_dtensor(x: Tensor) -> bool:
    """Return whether ``x`` is a DTensor, of which this rank may hold a shard only."""
    return isinstance(x, DTensor)


def full_tensor(x: Tensor) -> Tensor:
    """Gather a DTensor; every rank that holds a shard must call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local_tensor(x: Tensor) -> Tensor:
    """Return the shard of ``x`` that this rank holds."""
    return x.to_local() if isinstance(x, DTensor) else x


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of ``value``, laid out as ``like``.

    Args:
        value: The full tensor, identical on all ranks.
        like: A tensor of the same shape; if it is no DTensor, ``value`` is returned.
    """
    if not isinstance(like, DTensor):
        return value
    # src_data_rank=None: all ranks hold the same values already, so nothing is broadcast
    sharded = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return sharded.to_local()
