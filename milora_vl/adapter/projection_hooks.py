"""Hooks on parameters and optimizers that keep directions protected, and the guard that stops a training without them.

The guard is a gradient hook on every protected factor. It raises until `keep_protected` has registered the optimizer,
and again after a step of any other optimizer that holds the factor: such a step may have moved it inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from milora_vl.adapter.errors import AdapterError
from milora_vl.adapter.protection import Protected

Factors = tuple[nn.Parameter, nn.Parameter]

_guarded = WeakIdKeyDictionary()  # factor -> its Protected, as long as the factor lives


class ProjectionHook:
    """Optimizer hook that removes the protected directions after each step.

    A penalty removes a share that depends on the learning rate of the step.
    """

    def __init__(self) -> None:
        self.pairs: list[tuple[Protected, Factors]] = []

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Project all factors after a step. Raises AdapterError if the optimizer no longer steps them."""
        rates = learning_rates(optimizer, self.pairs)
        for protected, factors in self.pairs:
            protected.remove(factors, [protected.protect.share(rates[id(factor)]) for factor in factors])


class GradientProjectionHook:
    """Gradient hook that removes the protected directions from the gradient of one factor."""

    def __init__(self, protected: Protected, axis: int) -> None:
        self.protected, self.axis = protected, axis

    def __call__(self, grad: Tensor) -> Tensor:
        """Return the projected gradient, in its data type."""
        return self.protected.outside(grad, self.axis).to(grad.dtype)


def projection_hooks(optimizer: torch.optim.Optimizer) -> list[ProjectionHook]:
    """Return the projection hooks of an optimizer: one after `keep_protected`, else none."""
    return [hook for hook in optimizer._optimizer_step_post_hooks.values() if isinstance(hook, ProjectionHook)]


def learning_rates(optimizer: torch.optim.Optimizer, pairs: Sequence[tuple[Protected, Factors]]) -> dict[int, float]:
    """Return the learning rate of each factor, by id. Raises AdapterError if the optimizer does not step them all."""
    by_factor = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    for protected, factors in pairs:
        if any(id(factor) not in by_factor for factor in factors):
            raise AdapterError(
                f"the optimizer does not step the factors themselves, so the {protected.protect} cannot be protected",
                code="adapter-sharded-optimizer",
                where=protected.path,
                hint="pass an optimizer of this model's own factors; DeepSpeed and FSDP step shards of them: "
                "train without both, or without protect",
            )
    return by_factor


def guard(protected: Protected, factors: Sequence[Tensor]) -> None:
    """Let the gradients of these factors raise AdapterError while no optimizer keeps their directions protected.

    A factor that does not train now, as in an adapter that is not active, is guarded once it trains.
    """
    _watch_steps()
    for factor in factors:
        trains = factor.requires_grad
        factor.requires_grad_(True).register_hook(protected.require_kept)  # hooks need it, and stay without it
        factor.requires_grad_(trains)
        _guarded[factor] = protected


@cache
def _watch_steps() -> None:
    """Register `_notice_step` for all optimizers, once in a process."""
    register_optimizer_step_post_hook(_notice_step)


def _notice_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Note for every factor of the optimizer whether this step was projected. It runs after the optimizer's hooks."""
    if not _guarded:
        return
    projected = {id(protected) for hook in projection_hooks(optimizer) for protected, _ in hook.pairs}
    for group in optimizer.param_groups:
        for factor in group["params"]:
            protected = _guarded.get(factor)
            if protected is not None:
                protected.is_kept = id(protected) in projected
