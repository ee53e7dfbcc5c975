"""Optimizer parameter groups: learning rate and weight decay of each trained parameter, by its rule.

`RatesOfRules` is a mixin that gives them to HF's Trainer and to TRL's trainers.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from math import isclose
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import AdapterError, module_path
from milora_vl.core.policy import Target
from milora_vl.core.policy.towers import TOWERS

if TYPE_CHECKING:
    from transformers import Trainer

    _Trainer = Trainer
else:
    _Trainer = object

_PEFT_PARTS = re.compile(r"\.modules_to_save\.[^.]+|\.base_layer")


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float = 0.0, decays: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Return the groups for a torch optimizer, one for each pair of rates that the rules of `model` have.

    `model` comes from `apply_milora` or `load_adapter`, and may be wrapped. The arguments fill the gaps: of rules
    without a rate, and of parameters that no rule selects. `decays` contains the names of the parameters with weight
    decay; by default these are the matrices, not biases and norms. Weight decay on an adapter pulls towards no update,
    because its differences from the start train.

    The first group holds the adapter of the language tower, if there is one: HF logs its learning rate.

    Raises AdapterError for a model without rules, and for a negative rate.

    >>> from milora_vl import apply_milora
    >>> full = {"modules": "1", "method": "full", "learning_rate": 2e-5}
    >>> rules = [{"modules": "0", "method": "lora", "rank": 2}, full]
    >>> model = apply_milora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), rules)
    >>> optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=2e-4, weight_decay=0.1))
    >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    [(0.0002, 0.1), (2e-05, 0.1), (2e-05, 0.0)]
    """
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not (isinstance(value, int | float) and 0 <= value < math.inf):
            raise AdapterError(f"expected a number from 0, got {value!r}", where=name)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter, target in sorted(_trained(model), key=_order):
        rate, decay = learning_rate, weight_decay
        if target is not None:
            rate = rate if target.learning_rate is None else target.learning_rate
            decay = decay if target.weight_decay is None else target.weight_decay
        is_decayed = _is_matrix(parameter) if decays is None else name in decays
        groups.setdefault((rate, decay if is_decayed else 0.0), []).append(parameter)
    return [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Target | None]]:
    """Yield the name of every parameter that trains, the parameter, and its target if a rule selects it.

    Raises AdapterError if no rules are found in `model` and its modules.
    """
    owner = next((module for module in model.modules() if "milora_targets" in vars(module)), None)
    if owner is None:
        hint = "pass the model that apply_milora, or load_adapter(..., is_trainable=True), returned"
        raise AdapterError(f"no rules belong to this {type(model).__name__}", hint=hint)
    settings = {target.path: target for target in vars(owner)["milora_targets"]}
    target_of = {
        id(p): settings.get(module_path(_PEFT_PARTS.sub("", name), settings)) for name, p in owner.named_parameters()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, target_of.get(id(parameter))


def _order(trained: tuple[str, nn.Parameter, Target | None]) -> tuple[bool, int]:
    name, _, target = trained
    tower = None if target is None else target.tower
    return ".lora_" not in name, TOWERS.index(tower) if tower in TOWERS else len(TOWERS)


def _is_matrix(parameter: nn.Parameter) -> bool:
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # a shard of ZeRO-3 has one dimension


_unchecked: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # models before their first step
_seen: WeakSet[torch.optim.Optimizer] = WeakSet()


def check_rates_at_first_step(model: nn.Module, *, allow_one_rate: bool = False) -> None:
    """Warn at the first step on `model` if the optimizer has other rates than the rules.

    With `allow_one_rate`, one rate for all rules is no reason to warn: it is that of an earlier training.
    """
    _check_first_steps()
    _unchecked[model] = allow_one_rate


@cache
def _check_first_steps() -> None:
    """Register `_check_rates` for all optimizers, once in a process."""
    register_optimizer_step_pre_hook(_check_rates)


def _check_rates(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not _unchecked or optimizer in _seen:
        return
    _seen.add(optimizer)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for model, allow_one_rate in list(_unchecked.items()):
        stepped = [(p, t, group_of[id(p)]) for _, p, t in _trained(model) if t is not None and id(p) in group_of]
        if stepped:
            del _unchecked[model]
            if not allow_one_rate or len({(t.learning_rate, t.weight_decay) for _, t, _ in stepped}) > 1:
                _warn_of_other_rates(stepped)


def _warn_of_other_rates(stepped: Sequence[tuple[nn.Parameter, Target, Mapping[str, Any]]]) -> None:
    """Compare groups with rules. A scheduler may have changed `lr`; `initial_lr` is the rate before."""
    ignored: dict[str, None] = {}
    for parameter, target, group in stepped:
        rates = {"learning_rate": group.get("initial_lr", group.get("lr")), "weight_decay": group.get("weight_decay")}
        for name, rate in rates.items() if _is_matrix(parameter) else ():
            wanted = getattr(target, name)
            if wanted is not None and rate is not None and not isclose(wanted, float(rate), rel_tol=1e-6):
                ignored[f"{name} {wanted:g} of {target.tower or target.path} (it has {float(rate):g})"] = None
    if ignored:
        warnings.warn(
            f"the optimizer ignores rules: {', '.join(ignored)}. Pass it parameter_groups(model, learning_rate=...), "
            "or put milora_vl.core.adapter.rates.RatesOfRules before your Trainer's class",
            stacklevel=2,
        )


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
