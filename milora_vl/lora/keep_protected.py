"""Keep adapters out of their protected directions while an optimizer trains them."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from milora_vl.lora.errors import AdapterError
from milora_vl.lora.install import lora_layer, trained_factors
from milora_vl.lora.peft_model import MiloraMixin
from milora_vl.lora.protection import Protected

Factors = tuple[nn.Parameter, nn.Parameter]


def keep_protected(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make every step of `optimizer` leave the protected directions of the adapters in `model` as their rules say.

    Call it once, before the first step; `python -m milora_vl.train` does so by itself. With a Trainer of Hugging Face's
    or TRL's: `keep_protected(model, trainer.create_optimizer())`. A model without a rule that protects is left as it
    is, and a second call for one optimizer changes nothing.

    Raises AdapterError for an optimizer that does not step the factors themselves (another model's, or one made of
    shards, as DeepSpeed's and FSDP's).

    >>> from milora_vl import apply_milora
    >>> rules = [{"modules": "language", "method": "milora", "rank": 2, "protect": {"top": 1}}]
    >>> model = apply_milora(nn.Sequential(nn.Linear(4, 4)), rules)
    >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    >>> keep_protected(model, optimizer)
    """
    pairs = _training(model)
    bare = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if not pairs:
        return
    keeper = _ProjectionHook(pairs)
    keeper.rates(bare)
    if any(isinstance(hook, _ProjectionHook) for hook in bare._optimizer_step_post_hooks.values()):
        return
    for protected, factors in pairs:
        protected.is_kept = True
        if protected.protect.by == "basis":
            for axis, factor in enumerate(factors):
                factor.register_hook(_GradientProjectionHook(protected, axis))
    bare.register_step_post_hook(keeper)


def _training(model: nn.Module) -> list[tuple[Protected, Factors]]:
    """What is protected of the adapters that train, with their factors; `model` may be wrapped."""
    found = []
    for ours in (module for module in model.modules() if isinstance(module, MiloraMixin)):
        for adapter, protected in ours.protections.items():
            pairs = [(p, trained_factors(lora_layer(ours, path), adapter)) for path, p in protected.items()]
            found += [(p, factors) for p, factors in pairs if all(factor.requires_grad for factor in factors)]
    return found


class _GradientProjectionHook:
    """A hook on the gradient of a factor that projects it."""

    def __init__(self, protected: Protected, axis: int) -> None:
        self.protected, self.axis = protected, axis

    def __call__(self, grad: Tensor) -> Tensor:
        return self.protected.outside(grad, self.axis).to(grad.dtype)


class _ProjectionHook:
    """A hook after each step of an optimizer. A penalty goes by the learning rate that the step was made with."""

    def __init__(self, pairs: list[tuple[Protected, Factors]]) -> None:
        self.pairs = pairs

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rates = self.rates(optimizer)
        for protected, factors in self.pairs:
            protected.remove(factors, [protected.protect.share(rates[id(factor)]) for factor in factors])

    def rates(self, optimizer: torch.optim.Optimizer) -> dict[int, float]:
        """The learning rates by factor."""
        by_factor = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        for protected, factors in self.pairs:
            if any(id(factor) not in by_factor for factor in factors):
                raise AdapterError(
                    f"{protected.path}: the optimizer does not step its factors themselves, so the "
                    f"{protected.protect} cannot be protected\n"
                    "DeepSpeed and FSDP step shards of them: train without these, or without protect"
                )
        return by_factor
