"""Work dealt out to the processes of a distributed run, one piece to each at a time, and its results shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Piece = TypeVar("Piece")


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and their number; (0, 1) where nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def assign_work(pieces: Sequence[tuple[float, Piece]]) -> list[list[Piece]]:
    """Return (cost, piece) in hands of at most one piece per process, pieces of like cost together.

    The largest come first, and a hand takes as long as its largest piece. One process keeps the order as it is.
    """
    _, processes = rank_and_world_size()
    if processes > 1:
        pieces = sorted(pieces, key=lambda piece: -piece[0])
    return [[piece for _, piece in pieces[i : i + processes]] for i in range(0, len(pieces), processes)]


def gather(value: Any) -> list[Any]:
    """Return what every process gives, by rank: small picklable things."""
    _, processes = rank_and_world_size()
    if processes == 1:
        return [value]
    values: list[Any] = [None] * processes
    dist.all_gather_object(values, value)
    return values


def broadcast(
    tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, owner: int
) -> Tensor:
    """Return the owner's tensor in every process, bit for bit; the others pass None."""
    rank, processes = rank_and_world_size()
    if processes == 1:
        assert tensor is not None
        return tensor
    travels = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    if rank == owner:
        assert tensor is not None
        buffer = tensor.to(travels).contiguous()
    else:
        buffer = torch.empty(shape, dtype=dtype, device=travels)
    dist.broadcast(buffer, src=owner)
    return buffer.to(device)


def from_first_rank(tensor: Tensor) -> Tensor:
    """Return the tensor as rank 0 has it: signs and nearly equal components may differ between machines."""
    rank, _ = rank_and_world_size()
    return broadcast(tensor if rank == 0 else None, tuple(tensor.shape), tensor.dtype, tensor.device, owner=0)
