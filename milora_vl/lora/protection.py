"""Protected directions: the first k singular directions of a weight, orthogonal to the update of its adapter.

V (in, k) and U (out, k) hold the right and left singular vectors. The update B A - B0 A0 vanishes on them,

    (B A - B0 A0) V = 0    and    U' (B A - B0 A0) = 0,

if A V = A0 V = 0 and U'B = U'B0 = 0. `keep_protected.py` keeps A and B that way while they train. Minor anchors are
orthogonal to V and U by construction, up to rounding, which `kept_outside` removes. `policy/rules.py` describes the
field `protect` of a rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from milora_vl.initialize import Initial, Progress, cached_factors, matrix_bar
from milora_vl.lora.errors import AdapterError
from milora_vl.lora.install import base_layer
from milora_vl.policy.rules import Protect, Target
from milora_vl.svd.precision import full_precision
from milora_vl.weights.distributed import from_first_rank, rank_and_world_size
from milora_vl.weights.matrices import read_matrix

ROUNDING = 1e-4  # float32 training leaves at most this overlap; half precision leaves its own rounding error


@dataclass(slots=True, eq=False)
class Protected:
    """The protected directions of the weight at `path`: U (out, k) and V (in, k), both orthonormal.

    `energy` is their share of ||W||_F^2. `is_kept` is True once `keep_protected` has registered an optimizer.
    """

    path: str
    protect: Protect
    U: Tensor
    V: Tensor
    energy: float
    is_kept: bool = False

    @property
    def num_bytes(self) -> int:
        """Return the memory of U and V in bytes."""
        return self.U.nbytes + self.V.nbytes

    def move_to(self, device: torch.device) -> None:
        """Move U and V to the device of the factors."""
        self.U, self.V = self.U.to(device), self.V.to(device)

    def inside(self, factor: Tensor, axis: int) -> Tensor:
        """Return the component of a factor in the protected directions, in its shape.

        That is A V V' for A (axis 0) and U U'B for B (axis 1).
        """
        if factor.device != self.V.device:
            self.move_to(factor.device)
        with full_precision(factor.device):
            basis = (self.V, self.U)[axis]
            flat = factor.detach().flatten(1)
            basis, flat = (tensor.to(torch.promote_types(basis.dtype, flat.dtype)) for tensor in (basis, flat))
            component = (flat @ basis) @ basis.T if axis == 0 else basis @ (basis.T @ flat)
            return component.reshape(factor.shape)

    def outside(self, factor: Tensor, axis: int) -> Tensor:
        """Return the factor without its component in the protected directions, in float32 or float64."""
        return factor.detach() - self.inside(factor, axis)

    @torch.no_grad()
    def remove(self, factors: Sequence[Tensor], shares: Sequence[float] = (1.0, 1.0)) -> None:
        """Subtract these shares of the protected components from A and B, in place."""
        for axis, (factor, share) in enumerate(zip(factors, shares, strict=True)):
            factor.sub_(share * self.inside(factor, axis))

    def overlap(self, factors: Sequence[Tensor]) -> float:
        """Return the larger of ||A V|| / ||A|| and ||U'B|| / ||B||: 0 if both factors are orthogonal to them."""
        pairs = [(self.inside(factor, axis), factor.detach()) for axis, factor in enumerate(factors)]
        norms = [tuple(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in pair) for pair in pairs]
        return max(part / whole if whole > 0 else 0.0 for part, whole in norms)

    def is_violated_by(self, factors: Sequence[Tensor]) -> bool:
        """Return True if a hard constraint is violated by more than rounding."""
        allowed = max(ROUNDING, *(2 * torch.finfo(factor.dtype).eps for factor in factors))
        return self.protect.is_hard and self.overlap(factors) > allowed

    def require_kept(self, _: Tensor) -> None:
        """Gradient hook: raise AdapterError until `keep_protected` has registered an optimizer."""
        if not self.is_kept:
            raise AdapterError(
                f"the rule protects the {self.protect}, but no optimizer of this training keeps them protected",
                code="adapter-not-protected",
                where=self.path,
                hint="call  milora_vl.keep_protected(model, optimizer)  once, before the first step",
            )


@torch.no_grad()
def find_protected(
    model: nn.Module, targets: Sequence[Target], *, cache_dir: str | Path | None = None, progress: Progress = False
) -> dict[str, Protected]:
    """Return the protected directions of all targets whose rule has `protect`, by path.

    They come from the base weights of `model`, dequantized if necessary. All processes get identical bits from the
    first one. Raises AdapterError under ZeRO-3, and WeightError for weights that cannot be decomposed.
    """
    wanted = [(t, t.protect) for t in targets if t.protect is not None]
    if wanted and is_deepspeed_zero3_enabled():
        raise AdapterError(
            "ZeRO-3 partitions the factors, so they cannot be projected",
            code="adapter-sharded-optimizer",
            where="protect",
            hint="train without ZeRO-3, or without protect",
        )
    directions = {}
    with matrix_bar("protecting", len(wanted), is_shown=bool(progress) and rank_and_world_size()[0] == 0) as bar:
        for target, protect in wanted:
            W = read_matrix(base_layer(model, target.path))
            cache = None if cache_dir is None else Path(cache_dir)
            factors = cached_factors(W, protect.top, "principal", path=target.path, cache=cache)
            energy = float(factors.S.double().square().sum()) / factors.norm**2 if factors.norm > 0 else 0.0
            U, V = (from_first_rank(half.contiguous()) for half in (factors.U, factors.Vh.T))
            directions[target.path] = Protected(target.path, protect, U, V, energy)
            bar.update()
    return directions


def kept_outside(initial: Mapping[str, Initial], protected: Mapping[str, Protected]) -> dict[str, Initial]:
    """Return the anchors, projected out of the protected directions where the constraint is hard.

    Projected anchors are float32: rounding them to the base's dtype would put a component inside again.
    """
    hard = {path: p for path, p in protected.items() if p.protect.is_hard and path in initial}
    anchors = dict(initial)
    for path, directions in hard.items():
        A0, B0 = (directions.outside(half, axis) for axis, half in enumerate((initial[path].A0, initial[path].B0)))
        anchors[path] = replace(initial[path], A0=A0, B0=B0)
    return anchors
