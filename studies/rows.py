"""Rows of a fixed A as published relatives choose them; no method of the product does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from milora_vl import Policy
from milora_vl.core.adapter.fixed_a import first_rows_off
from milora_vl.core.calibration.activations import protected_inputs, task_sketches
from milora_vl.core.calibration.bases import Batches, Calibration
from milora_vl.core.weights.matrices import read_matrix
from studies.study import Rows


def rows_of(
    base: nn.Module, rules: list[dict[str, Any]], rows: Rows, texts: Calibration | None, task: Batches
) -> dict[str, Tensor]:
    """Return A (r, in) of each adapted layer, by path: the first rows of the task's gradient or of W, off directions.

    The directions are the protected inputs of the rules, and W's first right singular vectors as `rows` says.
    """
    targets = [target for target in Policy.parse(rules).resolve(base) if target.rank is not None]
    inputs = protected_inputs(base, targets, texts)
    found = {}
    sketches = task_sketches(base, [replace(target, method="gradient") for target in targets], task)
    for target in targets:
        W = read_matrix(base.get_submodule(target.path)).float()
        directions = W.new_zeros(target.shape[1], 0) if inputs is None else inputs.of(target.path).V
        directions = torch.cat([directions, principal(W, rows.off_weight)], dim=1)
        off = torch.linalg.qr(directions).Q[:, : target.shape[1] - (target.rank or 0)]
        found[target.path] = first_rows_off(sketches[target.path] if rows.of == "gradient" else W, off, target.rank)[0]
    return found


def principal(W: Tensor, share: float | str | None) -> Tensor:
    """Return the first right singular vectors of W (out, in) as columns: half of all, or those with a share of energy.

    >>> principal(torch.diag(torch.tensor([1.0, 2.0, 3.0])), 0.6).abs()
    tensor([[0.],
            [0.],
            [1.]])
    """
    if share is None:
        return W.new_zeros(W.shape[1], 0)
    _, S, Vh = torch.linalg.svd(W, full_matrices=False)
    count = W.shape[1] // 2 if share == "half" else int((S.square().cumsum(0) < share * S.square().sum()).sum()) + 1
    return Vh[:count].T
