"""FSDP2 in a training: shard the model, gather weights and optimizer for checkpoints, load them again.

accelerate shards the model (`fully_shard`) when the training starts. Hugging Face's Trainer would then write the whole
base beside every adapter, and an optimizer that only FSDP can read. Here each trained tensor is gathered instead, so
`adapter_model.safetensors` and `optimizer.pt` have the names, shapes and order of a run without FSDP. A run can
resume with any number of processes, with FSDP or without.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import get_mixed_precision_context_manager
from torch import Tensor, nn
from transformers import TrainerCallback

from milora_vl.common.compat.transformers import layer_kinds
from milora_vl.core.adapter.lora import base_model_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerControl, TrainerState, TrainingArguments


class RequireShards(TrainerCallback):
    """Raise RuntimeError if the training starts with whole weights: it would be DDP under another name."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        from torch.distributed.tensor import DTensor

        whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        if whole:
            raise RuntimeError(f"FSDP2 has not sharded {len(whole)} parameters, such as {whole[0]}")


def prepare(accelerator: Accelerator, model: nn.Module) -> None:
    """Make FSDP2 compute as DDP does: autocast chooses the dtype of products, and gradients are reduced in float32.

    accelerate would cast every gathered weight to half precision, also the differences of an adapter, which lose
    their digits then.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate sets it, and the next run of this process would read it
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    if plugin.transformer_cls_names_to_wrap is None:
        # transformers lists kinds of layers that this model may lack, such as CLIP's text embeddings; accelerate then
        # raises.
        present = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(present & layer_kinds(base_model_of(model)))
    if accelerator.native_amp:  # accelerate adds autocast to the forward of other wrappers, and not of this one
        autocast = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
        model.forward = autocast(model.forward)  # type: ignore[method-assign]


def gathered_state(model: nn.Module, *, only_trained: bool, keep: bool) -> dict[str, Tensor]:
    """Return the complete tensors of a sharded model on the CPU: its trained parameters, or its whole state dict.

    All processes must call it. The result is empty on processes that do not `keep` it.
    """
    reshard(model)
    named = model.named_parameters() if only_trained else model.state_dict(keep_vars=True).items()
    state = {}
    for name, tensor in named:
        if tensor.requires_grad or not only_trained:
            whole = _whole(tensor.detach())
            if keep:
                state[name] = whole.cpu()
    return state


def gathered_optimizer(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """Return the state dict of an optimizer with complete tensors on the CPU.

    All processes must call it. The result has no state on processes that do not `keep` it.
    """
    content: dict[str, Any] = optimizer.state_dict()
    states: dict[Any, dict[str, Any]] = {}
    for number, state in content["state"].items():
        for key, value in state.items():
            whole = _whole(value) if isinstance(value, Tensor) else value
            if keep:
                states.setdefault(number, {})[key] = whole.cpu() if isinstance(whole, Tensor) else whole
    return {**content, "state": states}


def load_optimizer(optimizer: torch.optim.Optimizer, content: Mapping[str, Any]) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def shard(number: int, value: Any) -> Any:
        parameter = parameters[number]
        if not (isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape):
            return value  # such as the number of steps
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    states = {
        number: {key: shard(int(number), value) for key, value in state.items()}
        for number, state in content["state"].items()
    }
    optimizer.load_state_dict({**content, "state": states})


def reshard(model: nn.Module) -> None:
    """Free the gathered weights that a forward without backward leaves, so that all parameters are shards again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _whole(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
