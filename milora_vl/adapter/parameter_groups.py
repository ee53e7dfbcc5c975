"""Optimizer parameter groups: learning rate and weight decay of each trained parameter, by its rule."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from milora_vl.adapter.names import module_path
from milora_vl.policy import Target

_PEFT_PARTS = re.compile(r"\.modules_to_save\.[^.]+|\.base_layer")


def parameter_groups(
    model: nn.Module,
    targets: Sequence[Target],
    *,
    learning_rate: float,
    weight_decay: float,
    decays: Collection[str],
) -> list[dict[str, Any]]:
    """Return the groups for a torch optimizer. The rates of a rule take precedence over the rates of the run.

    `decays` contains the names of the parameters with weight decay (HF excludes biases and norms). Weight decay on an
    adapter pulls towards no update, because its differences from the start train.
    """
    settings = {t.path: t for t in targets}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    towers: dict[float, list[str]] = {}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # HF logs the learning rate of the first group, so adapters come first.
    for name, parameter in sorted(named, key=lambda pair: ".lora_" not in pair[0]):
        target = settings.get(target_path(name, settings))
        assert target is not None, f"{name} trains, but no rule selects it"
        rate = learning_rate if target.learning_rate is None else target.learning_rate
        decay = weight_decay if target.weight_decay is None else target.weight_decay
        towers.setdefault(rate, []).append(str(target.tower))
        groups.setdefault((rate, decay if name in decays else 0.0), []).append(parameter)
    names = _names(towers)
    return [
        {"params": ps, "lr": rate, "weight_decay": decay, "name": names[rate]} for (rate, decay), ps in groups.items()
    ]


def _names(towers: dict[float, list[str]]) -> dict[float, str]:
    """Return a name for each learning rate, made of its towers, and numbered if several rates share a name.

    >>> _names({2e-4: ["language"], 1e-4: ["language"], 2e-5: ["projector", "vision"]})
    {0.0002: 'language', 0.0001: 'language-2', 2e-05: 'projector+vision'}
    """
    base_names = {rate: "+".join(dict.fromkeys(names)) for rate, names in towers.items()}
    order = list(base_names.values())
    counts = [order[: number + 1].count(name) for number, name in enumerate(order)]
    return {
        rate: name if count == 1 else f"{name}-{count}"
        for (rate, name), count in zip(base_names.items(), counts, strict=True)
    }


def target_path(name: str, paths: Collection[str]) -> str:
    """Return the module path in `paths` of the parameter `name` of a PeftModel or a plain model, or "" if none.

    >>> target_path("base_model.model.lm.q.lora_A.default.delta", ["lm.q", "lm"])
    'lm.q'
    """
    return module_path(_PEFT_PARTS.sub("", name), paths)
