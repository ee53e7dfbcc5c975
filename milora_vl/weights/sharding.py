"""Whether a model is sharded: by ZeRO-3, whose parameters have no elements outside forward, or by FSDP2."""

from __future__ import annotations

import sys

from torch import Tensor, nn

# FSDP2 imports these modules. Importing them here would take seconds at every start.
_TENSOR, _FSDP = "torch.distributed.tensor", "torch.distributed.fsdp"


def is_sharded(parameter: Tensor) -> bool:
    """Return True if this process holds a shard of a parameter, or nothing of it."""
    return parameter.numel() == 0 or is_fsdp_shard(parameter)


def is_fsdp_shard(tensor: Tensor) -> bool:
    """Return True for the shard of a tensor under FSDP2, a DTensor."""
    module = sys.modules.get(_TENSOR)
    return module is not None and isinstance(tensor, module.DTensor)


def uses_fsdp(model: nn.Module) -> bool:
    """Return True if FSDP2 shards modules of a model."""
    module = sys.modules.get(_FSDP)
    return module is not None and any(isinstance(child, module.FSDPModule) for child in model.modules())
