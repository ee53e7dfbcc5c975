"""The forms of protected directions, and how much of an update lies in them."""

from __future__ import annotations

from typing import Any

import torch

from milora_vl.adapter.install import factors, lora_layer
from milora_vl.weights.matrices import as_matrix

TOP = 4

HARD = [{"top": TOP}, {"top": TOP, "by": "basis"}]

FORMS = [*HARD, {"top": TOP, "by": "penalty", "weight": 30.0}]


def form_name(form: Any) -> str:
    return form if isinstance(form, str) else form.get("by", "projection")


def overlaps(model: Any, top: int = TOP) -> list[float]:
    """Of each adapted weight: how much of its update lies in the first directions, by torch's own decomposition."""
    found = []
    for target in (target for target in model.milora_targets if target.rank is not None):
        layer = lora_layer(model, target.path)
        base = layer.get_base_layer()
        W = as_matrix(base, base.weight.detach()).double()
        A, B = (factor.detach().double().flatten(1) for factor in factors(layer, "default"))
        update = B @ A
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        inside = max(float((U[:, :top].T @ update).norm()), float((update @ Vh[:top].T).norm()))
        assert float(update.norm()) > 0
        found.append(inside / float(update.norm()))
    return found
