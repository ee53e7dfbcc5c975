"""Hooks on parameters and optimizers that keep directions protected, and the guard that stops a training without them.

The guard is a gradient hook on every protected factor. It raises until `keep_protected` has registered the optimizer,
and again after a step of any other optimizer that holds the factor: such a step may have moved it inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from milora_vl.adapter.errors import AdapterError
from milora_vl.adapter.protection import Protected

_guarded = WeakIdKeyDictionary()  # factor -> its Protected, as long as the factor lives
_hooks: WeakKeyDictionary[torch.optim.Optimizer, ProjectionHook] = WeakKeyDictionary()


class ProjectionHook:
    """Optimizer hook that removes the protected directions after each step. `pairs` holds the input factor of each."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Protected, nn.Parameter]] = []

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Project all factors after a step. Raises AdapterError if the optimizer no longer steps them."""
        require_steps(optimizer, self.pairs)
        for protected, factor in self.pairs:
            protected.remove(factor)


def projection_hook(optimizer: torch.optim.Optimizer) -> ProjectionHook:
    """Return the projection hook of an optimizer, which is registered at the first call."""
    if optimizer not in _hooks:
        _hooks[optimizer] = ProjectionHook()
        optimizer.register_step_post_hook(_hooks[optimizer])
    return _hooks[optimizer]


def require_steps(optimizer: torch.optim.Optimizer, pairs: Sequence[tuple[Protected, nn.Parameter]]) -> None:
    """Raise AdapterError if the optimizer does not step all these factors."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for protected, factor in pairs:
        if id(factor) not in stepped:
            raise AdapterError(
                f"the optimizer does not step the factor itself, so the {protected.protect} cannot be protected",
                code="adapter-sharded-optimizer",
                where=protected.path,
                hint="pass an optimizer of this model's own factors; DeepSpeed and FSDP step shards of them: "
                "train without both, or without protect",
            )


def guard(protected: Protected, factor: Tensor) -> None:
    """Let the gradient of an input factor raise AdapterError while no optimizer keeps its directions protected.

    A factor that does not train now, as in an adapter that is not active, is guarded once it trains.
    """
    _watch_steps()
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
    hook = _hooks.get(optimizer)
    projected = set() if hook is None else {id(protected) for protected, _ in hook.pairs}
    for group in optimizer.param_groups:
        for factor in group["params"]:
            protected = _guarded.get(factor)
            if protected is not None:
                protected.is_kept = id(protected) in projected
