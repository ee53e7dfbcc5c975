"""Each trained parameter gets the rates of its own rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from milora_vl.adapter.apply import apply_milora
from milora_vl.adapter.parameter_groups import parameter_groups
from milora_vl.policy import Policy

RULES = [
    {"modules": "language", "method": "milora", "rank": 4, "learning_rate": 2e-4, "weight_decay": 0.1},
    {"modules": "language.layers[0].mlp", "learning_rate": 1e-4},
    {"modules": "projector", "method": "full"},
]


def test_groups_follow_the_rules(tiny_llava: Callable[..., Any]) -> None:
    model = apply_milora(tiny_llava()[0], Policy.parse(RULES))
    decays = {name for name, p in model.named_parameters() if p.requires_grad and "bias" not in name}
    groups = parameter_groups(model, model.milora_targets, learning_rate=2e-5, weight_decay=0.01, decays=decays)
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (2e-4, 0.1, 22),
        (1e-4, 0.1, 6),  # gate, up and down of layer 0, A and B each
        (2e-5, 0.01, 2),
        (2e-5, 0.0, 2),  # the projector's biases
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(g["params"]) for g in groups) == len(trained)
