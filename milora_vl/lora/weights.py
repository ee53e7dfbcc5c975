"""Read the weight of a layer as one matrix, whatever holds it: plain, quantised, or partitioned by ZeRO-3."""

from __future__ import annotations

import torch
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from milora_vl.lora.layers import as_matrix


def read_matrix(module: nn.Module) -> Tensor:
    """Return the layer's weight (out, in), detached: a view where it is plain, a copy where it had to be gathered."""
    with torch.no_grad(), gather_params_ctx(list(module.parameters(recurse=False)), modifier_rank=None):
        weight = as_matrix(module, dequantize_module_weight(module).detach())
        return weight.clone() if is_deepspeed_zero3_enabled() else weight


def factor_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype anchors are kept in: the weight's own, float32 where that is no dtype to train in."""
    dtype = module.get_parameter("weight").dtype
    return dtype if dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16) else torch.float32
