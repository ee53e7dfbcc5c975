"""`RatesOfRules`: a mixin that gives HF's Trainer and TRL's trainers the learning rates and weight decays of rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from milora_vl.common.errors import UserError
from milora_vl.core.adapter.rates import parameter_groups

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import Trainer

    _Trainer = Trainer
else:
    _Trainer = object


class RatesOfRules(_Trainer):
    """Create the optimizer of `--optim` with one group per learning rate and weight decay of the rules.

    Name it before the trainer. Rules without rates, and parameters without a rule, have the trainer's.

    >>> from transformers import Trainer
    >>> class MyTrainer(RatesOfRules, Trainer):
    ...     pass
    """

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            if not isinstance(cls, type) or {"params", "model", "optimizer_dict"} & set(options):
                raise UserError(
                    f"{self.args.optim} makes its own parameter groups, so learning rates per rule are not possible",
                    where="--optim",
                    hint="use another optimizer, for example  --optim adamw_torch",
                )
            groups = parameter_groups(
                trained,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                decays=set(self.get_decay_parameter_names(trained)),
            )
            self.optimizer_cls_and_kwargs = (cls, {**options, "params": groups})
        return super().create_optimizer(model)
