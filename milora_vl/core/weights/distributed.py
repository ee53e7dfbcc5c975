"""Share results among processes; recognize sharded weights."""

from __future__ import annotations

import sys
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value: Any) -> list[Any]:
    _, processes = rank_and_world_size()
    if processes == 1:
        return [value]
    values: list[Any] = [None] * processes
    dist.all_gather_object(values, value)
    return values


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can use on a device; on a CPU, its share of the machine's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available / rank_and_world_size()[1])


def device_of_collectives() -> torch.device:
    is_nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def broadcast(
    tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, owner: int
) -> Tensor:
    rank, processes = rank_and_world_size()
    if processes == 1:
        assert tensor is not None
        return tensor
    buffer = torch.empty(shape, dtype=dtype, device=device_of_collectives())
    if rank == owner and tensor is not None:
        buffer.copy_(tensor)
    dist.broadcast(buffer, src=owner)
    return buffer.to(device)


def from_first_rank(tensor: Tensor) -> Tensor:
    """Return the tensor of rank 0 in every process: signs and nearly equal components can differ between machines."""
    rank, _ = rank_and_world_size()
    return broadcast(tensor if rank == 0 else None, tuple(tensor.shape), tensor.dtype, tensor.device, owner=0)


# FSDP2 imports these modules. Importing them here would take seconds at every start.
_TENSOR, _FSDP = "torch.distributed.tensor", "torch.distributed.fsdp"


def is_sharded(parameter: Tensor) -> bool:
    """Return True if this process holds a shard of a parameter (under FSDP2 a DTensor), or nothing of it."""
    module = sys.modules.get(_TENSOR)
    return parameter.numel() == 0 or (module is not None and isinstance(parameter, module.DTensor))


def uses_fsdp(model: nn.Module) -> bool:
    module = sys.modules.get(_FSDP)
    return module is not None and any(isinstance(child, module.FSDPModule) for child in model.modules())
