"""`keep_protected`: project the steps of an optimizer off the protected inputs (also under ZeRO and FSDP2)."""

from __future__ import annotations

import torch
from torch import nn

from milora_vl.adapter.install import lora_layer, trained_factors
from milora_vl.adapter.peft_model import MiloraMixin
from milora_vl.adapter.projection_hooks import projection_hook, require_steps
from milora_vl.adapter.protection import Protected
from milora_vl.compat.deepspeed import update_full_parameter


def keep_protected(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Remove the protected inputs from the adapters in `model` after every step of `optimizer`.

    Call this once before the first step; `python -m milora_vl.train` does it automatically. A Trainer of Hugging Face
    or TRL needs the call `keep_protected(model, trainer.create_optimizer())`. The function does nothing if no rule has
    `protect`. A second call for one optimizer covers the adapters that train since the first, and changes nothing else.

    Every optimizer of the factors needs a call. After a step of one without it, and in a copy of the model, the next
    gradient raises AdapterError.

    Raises AdapterError if the optimizer does not step the input factors themselves: it belongs to another model, or it
    steps shards, as in DeepSpeed and FSDP; see `ShardedProjection` and `FsdpProjection`.

    >>> from milora_vl import apply_milora
    >>> rules = [{"modules": "language", "method": "milora", "rank": 2, "protect": {"inputs": 0.5}}]
    >>> batches = [{"input": torch.randn(8, 4)} for _ in range(2)]
    >>> model = apply_milora(nn.Sequential(nn.Linear(4, 4)), rules, calibration=batches)
    >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0)
    >>> keep_protected(model, optimizer)
    """
    pairs = _training(model)
    bare = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has no hooks of its own
    if not pairs:
        return
    require_steps(bare, pairs)  # raises now, not at the first step
    hook = projection_hook(bare)
    known = {id(protected) for protected, _ in hook.pairs}
    for protected, factor in pairs:
        protected.is_kept = True
        if id(protected) not in known:
            hook.pairs.append((protected, factor))


def _training(model: nn.Module) -> list[tuple[Protected, nn.Parameter]]:
    """Return the protected directions and input factors of all adapters that train; `model` may be wrapped."""
    training: list[tuple[Protected, nn.Parameter]] = []
    for ours in (module for module in model.modules() if isinstance(module, MiloraMixin)):
        for adapter, protected in ours.protections.items():
            pairs = [(p, trained_factors(lora_layer(ours, path), adapter)[0]) for path, p in protected.items()]
            training += [(p, factor) for p, factor in pairs if factor.requires_grad]
    return training


class ShardedProjection:
    """Keep directions protected while DeepSpeed trains: call `project` after every step, on all processes.

    DeepSpeed steps float32 shards of the factors, so each factor is gathered, projected and written back.
    """

    def __init__(self, model: nn.Module) -> None:
        self.pairs = _training(model)
        for protected, _ in self.pairs:
            protected.is_kept = True

    @torch.no_grad()
    def project(self) -> None:
        """Remove the protected directions from the input factor of every layer."""
        for protected, factor in self.pairs:
            update_full_parameter(factor, protected.outside)
            protected.is_kept = True  # an inner optimizer may have stepped the factors themselves before


class FsdpProjection:
    """Keep directions protected while FSDP2 trains: call `project` after every step, on all processes.

    A process holds rows of D (r, in), which are projected one by one, so nothing is sent.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pairs: list[tuple[Protected, nn.Parameter]] = []  # FSDP2 replaces the factors when the training starts

    @torch.no_grad()
    def project(self) -> None:
        """Remove the protected directions from the input factor of every layer."""
        from torch.distributed.tensor import DTensor

        self.pairs = self.pairs or _training(self.model)
        for protected, factor in self.pairs:
            assert isinstance(factor, DTensor), "FSDP2 has not sharded this factor"
            if len(rows := factor.to_local()):
                protected.remove(rows)
