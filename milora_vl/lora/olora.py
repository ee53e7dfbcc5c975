"""OLoRA's start (arXiv:2406.01775) as a baseline: the first r columns of Q and rows of R of W = Q R.

As PEFT's `olora_init`, but in the anchored form: the base weight stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn

from milora_vl.initialize import Initial, LayerReport
from milora_vl.lora.dealing import from_first_rank
from milora_vl.lora.fingerprint import sketch
from milora_vl.lora.weights import factor_dtype, read_matrix
from milora_vl.policies.rules import Target


@torch.no_grad()
def start_olora(model: nn.Module, targets: Sequence[Target]) -> dict[str, Initial]:
    """Return A0 = R[:r] and B0 = Q[:, :r] of the targets whose method is olora, rounded to the base's dtype."""
    return {t.path: _initial(model.get_submodule(t.path), t) for t in targets if t.method == "olora"}


def _initial(module: nn.Module, target: Target) -> Initial:
    assert target.rank is not None
    start = time.perf_counter()
    W = read_matrix(module)
    Q, R = torch.linalg.qr(W.float())
    A0, B0 = R[: target.rank].contiguous(), Q[:, : target.rank].contiguous()
    sigma = target.scaling * torch.linalg.svdvals(A0)  # B0 has orthonormal columns
    norm = float(torch.linalg.vector_norm(W.float()))
    report = LayerReport(
        path=target.path,
        shape=(W.shape[0], W.shape[1]),
        tower=target.tower,
        method=target.method,
        rank=target.rank,
        sigma_min=float(sigma[-1]),
        sigma_max=float(sigma[0]),
        sigma_top=float(torch.linalg.matrix_norm(W.float(), ord=2)),
        energy=float(sigma.square().sum()) / norm**2 if norm > 0 else 0.0,
        excess=0.0,
        svd="qr",
        drift=0.0,
        seconds=time.perf_counter() - start,
    )
    dtype = factor_dtype(module)
    return Initial(from_first_rank(A0.to(dtype)), from_first_rank(B0.to(dtype)), sketch(W), report)
