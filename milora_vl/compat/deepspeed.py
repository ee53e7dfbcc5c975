"""What the core needs of DeepSpeed, which it does not depend on: imported by the function that uses it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn


@torch.no_grad()
def update_full_parameter(parameter: nn.Parameter, update: Callable[[Tensor], Tensor]) -> None:
    """Replace a parameter by `update` of its whole float32 value. All processes must call it.

    DeepSpeed steps float32 shards. The new value is written into them, and into the parameter that the next forward
    reads, which DeepSpeed would update with the next step alone.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    whole = safe_get_full_fp32_param(parameter)
    assert whole is not None, "the optimizer of DeepSpeed does not step this parameter"
    updated = update(whole)
    safe_set_full_fp32_param(parameter, updated)
    with gather_params_ctx([parameter], modifier_rank=0):
        parameter.copy_(updated)
