"""Keep the update of adapters orthogonal to their protected directions while an optimizer trains them."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from milora_vl.lora.errors import AdapterError
from milora_vl.lora.install import lora_layer, trained_factors
from milora_vl.lora.peft_model import MiloraMixin
from milora_vl.lora.protection import Protected

Factors = tuple[nn.Parameter, nn.Parameter]


def keep_protected(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Remove the protected directions from the adapters in `model` after every step of `optimizer`.

    Call this once before the first step; `python -m milora_vl.train` does it automatically. A Trainer of Hugging Face
    or TRL needs the call `keep_protected(model, trainer.create_optimizer())`. The function does nothing if no rule has
    `protect`, and a second call for one optimizer changes nothing.

    Raises AdapterError if the optimizer does not step the factors themselves: it belongs to another model, or it steps
    shards, as in DeepSpeed and FSDP.

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
    hook = _ProjectionHook(pairs)
    hook.rates(bare)  # raises now, not at the first step
    if any(isinstance(other, _ProjectionHook) for other in bare._optimizer_step_post_hooks.values()):
        return
    for protected, factors in pairs:
        protected.is_kept = True
        if protected.protect.by == "basis":
            for axis, factor in enumerate(factors):
                factor.register_hook(_GradientProjectionHook(protected, axis))
    bare.register_step_post_hook(hook)


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


class _GradientProjectionHook:
    """Gradient hook that removes the protected directions from the gradient of one factor."""

    def __init__(self, protected: Protected, axis: int) -> None:
        self.protected, self.axis = protected, axis

    def __call__(self, grad: Tensor) -> Tensor:
        return self.protected.outside(grad, self.axis).to(grad.dtype)


class _ProjectionHook:
    """Optimizer hook that removes the protected directions after each step.

    A penalty removes a share that depends on the learning rate of the step.
    """

    def __init__(self, pairs: list[tuple[Protected, Factors]]) -> None:
        self.pairs = pairs

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rates = self.rates(optimizer)
        for protected, factors in self.pairs:
            protected.remove(factors, [protected.protect.share(rates[id(factor)]) for factor in factors])

    def rates(self, optimizer: torch.optim.Optimizer) -> dict[int, float]:
        """Return the learning rate of each factor, by id."""
        by_factor = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        for protected, factors in self.pairs:
            if any(id(factor) not in by_factor for factor in factors):
                raise AdapterError(
                    "the optimizer does not step the factors themselves, so "
                    f"the {protected.protect} cannot be protected",
                    code="adapter-sharded-optimizer",
                    where=protected.path,
                    hint="pass an optimizer of this model's own factors; DeepSpeed and FSDP step shards of them: "
                    "train without both, or without protect",
                )
        return by_factor
