"""The choice of a fixed A: rows off the protected inputs of a layer, of one length, and how well they protect it.

V (in, k) holds the input directions that ordinary text and pictures use (`milora_vl/core/calibration`). The rows are
the first right singular vectors of the task's gradient, those of a method's triplets, or random, times I - V V'.
`fixed_a.py` has the layer. B alone trains there, so equal trained parameters need a higher rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_vl.core.adapter.errors import AdapterError
from milora_vl.core.calibration.bases import ProtectedInputs
from milora_vl.core.init.initialize import Initial
from milora_vl.core.policy.rules import Target
from milora_vl.core.svd.precision import full_precision

# Twice the length that PEFT's LoRA starts with in every layer: a fixed A learns best at twice the learning rate
# (docs/studies/fixed-a.md), so that the rate of a LoRA suits it.
ROW_LENGTH = 2 * 3**-0.5
LARGEST_OVERLAP = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """How one layer is protected.

    - `directions`: the number k of protected input directions, of `inputs` in total.
    - `energy`: the share of the layer's input energy that they hold on calibration data: at least the rule's `protect`,
      or what leaves as many other directions as the rank.
    - `held_out`: the same on calibration data that did not choose them; None without such data.
    - `kept`: the mean share of the start's rows, or of the task's gradient, that lies off the protected directions.
    - `overlap`: ||A V|| / ||A|| at the start; rounding alone.
    """

    directions: int
    inputs: int
    energy: float
    held_out: float | None
    kept: float
    overlap: float


def fixed_factors(
    targets: Sequence[Target],
    initial: Mapping[str, Initial],
    sketches: Mapping[str, Tensor],
    inputs: ProtectedInputs | None,
) -> tuple[dict[str, Tensor], dict[str, Protection]]:
    """Return A (r, in) in float32 of every target with a fixed A, and the protection of each with protected inputs.

    The rows are the right singular vectors in `initial`, the first ones of the task's gradient in `sketches`, or random
    for a method that has neither.
    """
    factors, protections = {}, {}
    for target in targets:
        if not target.has_fixed_A:
            continue
        start = sketches.get(target.path)
        if start is None:
            start = initial[target.path].A0 if target.is_decomposed else _random_rows(target)
        basis = inputs.of(target.path) if inputs is not None and target.protect else None
        V = start.new_zeros(target.shape[1], 0) if basis is None else basis.V
        V = V.to(start.device, torch.float32)
        A, kept = first_rows_off(start, V, target.rank) if target.path in sketches else off_inputs(start, V)
        factors[target.path] = A
        if basis is None:
            continue
        inside = overlap(A, V)
        if inside > LARGEST_OVERLAP:
            raise AdapterError(
                f"A has {inside:.1e} of its length along protected inputs; rounding alone leaves less than 1e-5",
                code="protect-overlap",
                where=target.path,
                hint="calibrate without cache_dir: the cached directions are damaged",
            )
        protections[target.path] = Protection(
            directions=basis.num_directions,
            inputs=basis.size,
            energy=basis.share,
            held_out=basis.held_out,
            kept=kept,
            overlap=inside,
        )
    return factors, protections


def first_rows_off(sketch: Tensor, V: Tensor, rank: int | None) -> tuple[Tensor, float]:
    """Return the first `rank` right singular vectors of a sketch (m, in) times I - V V', of length ROW_LENGTH.

    The second value is the share of the sketch's energy off V.
    """
    rows = sketch.float()
    with full_precision(rows.device):
        left = rows - (rows @ V) @ V.T
        A, _ = off_inputs(torch.linalg.svd(left, full_matrices=False).Vh[:rank], V)
    return A, float(left.square().sum() / rows.square().sum().clamp(min=torch.finfo(torch.float32).tiny))


def off_inputs(rows: Tensor, V: Tensor) -> tuple[Tensor, float]:
    """Return the rows (r, in) times I - V V', each of length ROW_LENGTH, and the mean share of them that is left.

    >>> A, kept = off_inputs(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
    >>> A, round(kept, 2)
    (tensor([[0.0000, 1.1547]]), 0.64)
    """
    rows = rows.float()
    with full_precision(rows.device):
        left = rows
        for _ in range(2):  # the second time removes what rounding left of the first
            left = left - (left @ V) @ V.T
    lengths = torch.linalg.vector_norm(left, dim=1, keepdim=True)
    before = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    share = (lengths / before.clamp(min=torch.finfo(torch.float32).tiny)).square()
    return left * (ROW_LENGTH / lengths.clamp(min=torch.finfo(torch.float32).tiny)), float(share.mean())


def overlap(A: Tensor, V: Tensor) -> float:
    """Return ||A V|| / ||A||, which is 0 if A (r, in) is off the directions V (in, k)."""
    with full_precision(A.device):
        inside, whole = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in (A.float() @ V, A))
    return float(inside / whole) if whole > 0 else 0.0


def _random_rows(target: Target) -> Tensor:
    assert target.rank is not None
    generator = torch.Generator().manual_seed(zlib.crc32(target.path.encode(), target.seed))
    return torch.randn(target.rank, target.shape[1], generator=generator)
