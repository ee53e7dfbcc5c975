"""Two starts that need activations, as exploratory arms of studies (`start: corda`, `start: metric`).

Both replace the anchor A0 (r, in), B0 (out, r) of an arm with `method: milora`; the update is s (B A - B0 A0) as usual.
Let C = E[x x'] (in, in) over calibration inputs x of a layer with the weight W (out, in).

- corda: the last r triplets of the singular value decomposition W C = U S V', with B0 = U sqrt(S / s) and
  A0 = sqrt(S / s) V' C^-1. This is CorDA's mode KPM (arXiv:2406.05223); PEFT's own `preprocess_corda` computes it.
- metric: the last r triplets of W C^(1/2) = U S V', with A0 = sqrt(S / s) V' C^(-1/2): the components of W that
  contribute least to its output on the calibration inputs, in the metric of these inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn

from milora_vl.adapter.install import anchors_of, lora_layer
from milora_vl.calibration.activations import energy_limits
from milora_vl.policy.rules import Target
from milora_vl.svd.precision import full_precision
from milora_vl.weights.matrices import read_matrix
from studies.study import Start

Factors = dict[str, tuple[Tensor, Tensor]]
Batches = Sequence[Mapping[str, Tensor]]
DAMP = 0.01  # of the mean of C's diagonal, added to it before it is inverted, as in CorDA


@torch.no_grad()
def replace_anchors(tuned: Any, factors: Factors) -> None:
    """Restart the adapters of `tuned` at other anchors, balanced and at scale 1: {path: (A0 (r, in), B0 (out, r))}."""
    for target in tuned.milora_targets:
        if target.path in factors:
            layer = lora_layer(tuned, target.path)
            for anchor, factor in zip(anchors_of(layer, "default"), factors[target.path], strict=True):
                anchor.copy_(factor / layer.scaling["default"] ** 0.5)  # D and E are zero, so step 0 is the base


def starting_factors(start: Start, base: nn.Module, targets: Sequence[Target], batches: Batches) -> Factors:
    """Return the factors of all linear `targets` with a rank, in float32.

    `batches` holds arguments of the model's forward: "input_ids" and "attention_mask" (rows, positions).
    """
    if start == "corda":
        return _corda(base, targets, batches)
    moments = _moments(base, targets, batches)
    return {
        target.path: metric_factors(read_matrix(base.get_submodule(target.path)), moments[target.path], target.rank)
        for target in targets
        if target.rank is not None
    }


def metric_factors(W: Tensor, C: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A0 (r, in) and B0 (out, r) of the last `rank` components of W (out, in) in the metric C (in, in).

    >>> W, C = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([0.01, 100.0]))
    >>> A0, B0 = metric_factors(W, C, 1)  # 3 x 0.1 contributes less to the output than 1 x 10
    >>> torch.allclose(B0 @ A0, torch.diag(torch.tensor([3.0, 0.0])), atol=1e-5)
    True
    """
    with full_precision(W.device):
        values, vectors = torch.linalg.eigh(C.float() + DAMP * C.diagonal().mean() * torch.eye(len(C)))
        root = values.clamp(min=0).sqrt()
        U, S, Vh = torch.linalg.svd((W.float() @ vectors) * root, full_matrices=False)
        S, U, Vh = S[-rank:].sqrt(), U[:, -rank:], Vh[-rank:]
        return S[:, None] * (Vh / root) @ vectors.T, U * S


def _corda(base: nn.Module, targets: Sequence[Target], batches: Batches) -> Factors:
    paths = {target.path: target.rank for target in targets if target.rank is not None}
    config = LoraConfig(
        r=max(paths.values()), rank_pattern=dict(paths), target_modules=list(paths), init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
    )  # fmt: skip

    def run() -> None:  # PEFT's hook needs one row without padding per call
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                base(input_ids=ids[mask > 0][None])

    with full_precision(torch.device("cpu")):
        preprocess_corda(base, config, run)
    factors = {}
    for path in paths:
        module: Any = base.get_submodule(path)
        eigens = module.eigens
        del module.eigens
        root = eigens.S_WC.sqrt()
        factors[path] = (root[:, None] * eigens.V_WC.T).contiguous(), (eigens.U_WC * root).contiguous()
    return factors


@torch.no_grad()
def _moments(base: nn.Module, targets: Sequence[Target], batches: Batches) -> dict[str, Tensor]:
    """Return C of each target; padding does not count, and attention sinks are limited as in calibration."""
    sums: dict[str, Tensor] = {}
    with _inputs_of(base, [t.path for t in targets if t.rank is not None]) as seen:
        for batch in batches:
            counts = batch["attention_mask"].bool()
            base(**batch)
            for path, x in seen.items():
                rows = x[counts].float()
                rows *= energy_limits(rows).sqrt()[:, None]
                sums[path] = rows.T @ rows + sums.get(path, 0.0)
            seen.clear()
    return sums


@contextmanager
def _inputs_of(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that holds the input of each layer after a forward."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        return lambda _, args: seen.update({path: args[0].detach()})

    handles = [model.get_submodule(path).register_forward_pre_hook(keep(path)) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
