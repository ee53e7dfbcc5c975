"""`keep_protected`: project gradients and steps of an optimizer off the protected directions (also ZeRO, FSDP2)."""

from __future__ import annotations

import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft.utils.integrations import gather_params_ctx
from torch import nn

from milora_vl.adapter.install import lora_layer, trained_factors
from milora_vl.adapter.peft_model import MiloraMixin
from milora_vl.adapter.projection_hooks import (
    Factors,
    GradientProjectionHook,
    ProjectionHook,
    learning_rates,
    projection_hooks,
)
from milora_vl.adapter.protection import Protected


def keep_protected(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Remove the protected directions from the adapters in `model` after every step of `optimizer`.

    Call this once before the first step; `python -m milora_vl.train` does it automatically. A Trainer of Hugging Face
    or TRL needs the call `keep_protected(model, trainer.create_optimizer())`. The function does nothing if no rule has
    `protect`. A second call for one optimizer covers the adapters that train since the first, and changes nothing else.

    Every optimizer of the factors needs a call. After a step of one without it, and in a copy of the model, the next
    gradient raises AdapterError.

    Raises AdapterError if the optimizer does not step the factors themselves: it belongs to another model, or it steps
    shards, as in DeepSpeed and FSDP; see `ShardedProjection` and `FsdpProjection`.

    >>> from milora_vl import apply_milora
    >>> rules = [{"modules": "language", "method": "milora", "rank": 2, "protect": {"top": 1}}]
    >>> model = apply_milora(nn.Sequential(nn.Linear(4, 4)), rules)
    >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0)
    >>> keep_protected(model, optimizer)
    """
    pairs = _training(model)
    bare = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if not pairs:
        return
    learning_rates(bare, pairs)  # raises now, not at the first step
    hooks = projection_hooks(bare)
    hook = hooks[0] if hooks else ProjectionHook()
    if not hooks:
        bare.register_step_post_hook(hook)
    known = {id(protected) for protected, _ in hook.pairs}
    for protected, factors in pairs:
        protected.is_kept = True
        if id(protected) not in known:
            hook.pairs.append((protected, factors))
        if protected.protect.by == "basis":
            for axis, factor in enumerate(factors):
                _project_gradient(protected, axis, factor)


def _project_gradient(protected: Protected, axis: int, factor: nn.Parameter) -> None:
    """Project the gradients of a factor from now on, once each, however many optimizers step it."""
    hooks = (factor._backward_hooks or {}).values()
    if not any(isinstance(hook, GradientProjectionHook) for hook in hooks):
        factor.register_hook(GradientProjectionHook(protected, axis))


def _training(model: nn.Module) -> list[tuple[Protected, Factors]]:
    """Return the protected directions and factors of all adapters that train; `model` may be wrapped."""
    training: list[tuple[Protected, Factors]] = []
    for ours in (module for module in model.modules() if isinstance(module, MiloraMixin)):
        for adapter, protected in ours.protections.items():
            pairs = [(p, trained_factors(lora_layer(ours, path), adapter)) for path, p in protected.items()]
            training += [(p, factors) for p, factors in pairs if all(factor.requires_grad for factor in factors)]
    return training


class ShardedProjection:
    """Keep directions protected while DeepSpeed trains: call `project` after every step, on all processes.

    DeepSpeed steps float32 shards of the factors, so each factor is gathered, projected and written back: into the
    shards, and into the parameter that the next forward reads, which DeepSpeed would update with the next step alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.pairs = _training(model)
        for protected, _ in self.pairs:
            assert protected.protect.by == "projection"
            protected.is_kept = True

    @torch.no_grad()
    def project(self) -> None:
        """Remove the protected directions from both factors of every layer."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        for protected, factors in self.pairs:
            for axis, factor in enumerate(factors):
                if axis == 1 and protected.outputs is None:
                    continue
                whole = safe_get_full_fp32_param(factor)
                assert whole is not None, "the optimizer of DeepSpeed does not step this factor"
                projected = protected.outside(whole, axis)
                safe_set_full_fp32_param(factor, projected)
                with gather_params_ctx([factor], modifier_rank=0):
                    factor.copy_(projected)
            protected.is_kept = True  # an inner optimizer may have stepped the factors themselves before


class FsdpProjection:
    """Keep directions protected while FSDP2 trains: call `project` after every step, on all processes.

    A process holds rows of each factor. D (r, in) is projected row by row, so nothing is sent; E (out, r) is gathered.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pairs: list[tuple[Protected, Factors]] = []  # FSDP2 replaces the factors when the training starts

    @torch.no_grad()
    def project(self) -> None:
        """Remove the protected directions from both factors of every layer."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        self.pairs = self.pairs or _training(self.model)
        for protected, factors in self.pairs:
            for axis, factor in enumerate(factors):
                assert isinstance(factor, DTensor), "FSDP2 has not sharded this factor"
                if axis == 0 and len(rows := factor.to_local()):
                    rows.copy_(protected.outside(rows, axis))
                elif axis == 1 and protected.outputs is not None:
                    projected = protected.outside(factor.full_tensor(), axis).to(factor.dtype)
                    factor.copy_(distribute_tensor(projected, factor.device_mesh, factor.placements))
