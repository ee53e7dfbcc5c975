"""The first singular directions of weights, which the updates of their adapters stay out of (policies/protect.py).

U'(B A - B0 A0) = 0 and (B A - B0 A0) V = 0 hold where A and A0 have nothing in the span of V (in, k), B and B0 nothing
in that of U (out, k). `keep.py` sees to A and B; minor anchors are outside but for rounding, which is taken out here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.integrations import is_deepspeed_zero3_enabled

from milora_vl.initialize import Initial, Progress, cached_factors
from milora_vl.lora.errors import AdapterError
from milora_vl.lora.install import base_layer
from milora_vl.policy.protect import Protect
from milora_vl.policy.rules import Target
from milora_vl.svd.precision import full_precision
from milora_vl.weights.distributed import from_first_rank, rank_and_world_size
from milora_vl.weights.matrices import read_matrix

ROUNDING = 1e-4  # overlap that float32 training leaves at most; in half precision it is that of the dtype


@dataclass(slots=True, eq=False)
class Protected:
    """What the update of the weight at `path` stays out of: the spans of U (out, k) and V (in, k), both orthonormal.

    `energy` is the share of ||W||_F^2 in these directions. `is_kept` tells that an optimizer keeps them.
    """

    path: str
    protect: Protect
    U: Tensor
    V: Tensor
    energy: float
    is_kept: bool = False

    @property
    def num_bytes(self) -> int:
        """Memory of U and V."""
        return self.U.nbytes + self.V.nbytes

    def move_to(self, device: torch.device) -> None:
        """Put U and V where the factors are."""
        self.U, self.V = self.U.to(device), self.V.to(device)

    def inside(self, factor: Tensor, axis: int) -> Tensor:
        """Return the part of a factor, in its shape, that lies in the directions: A V V' for axis 0, U U'B for 1."""
        if factor.device != self.V.device:
            self.move_to(factor.device)
        with full_precision(factor.device):
            basis = (self.V, self.U)[axis]
            flat = factor.detach().flatten(1)
            basis, flat = (tensor.to(torch.promote_types(basis.dtype, flat.dtype)) for tensor in (basis, flat))
            found = (flat @ basis) @ basis.T if axis == 0 else basis @ (basis.T @ flat)
            return found.reshape(factor.shape)

    def outside(self, factor: Tensor, axis: int) -> Tensor:
        """Return the factor without that part, in float32 or better."""
        return factor.detach() - self.inside(factor, axis)

    @torch.no_grad()
    def remove(self, factors: Sequence[Tensor], shares: Sequence[float] = (1.0, 1.0)) -> None:
        """Take these shares of what is inside out of A and B, in place."""
        for axis, (factor, share) in enumerate(zip(factors, shares, strict=True)):
            factor.sub_(share * self.inside(factor, axis))

    def overlap(self, factors: Sequence[Tensor]) -> float:
        """Return the larger of ||A V|| / ||A|| and ||U'B|| / ||B||: 0 outside, 1 inside."""
        pairs = [(self.inside(factor, axis), factor.detach()) for axis, factor in enumerate(factors)]
        norms = [tuple(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in pair) for pair in pairs]
        return max(part / whole if whole > 0 else 0.0 for part, whole in norms)

    def is_violated_by(self, factors: Sequence[Tensor]) -> bool:
        """Tell whether more than rounding of the factors is inside, where nothing may be."""
        allowed = max(ROUNDING, *(2 * torch.finfo(factor.dtype).eps for factor in factors))
        return self.protect.is_hard and self.overlap(factors) > allowed

    def require_kept(self, _: Tensor) -> None:
        """A hook on gradients of the factors: AdapterError while no optimizer keeps the directions."""
        if not self.is_kept:
            raise AdapterError(
                f"{self.path}: its rule protects the {self.protect}, and nothing does so in this training\n"
                "call  milora_vl.keep_protected(model, optimizer)  once, before the first step"
            )


@torch.no_grad()
def find_protected(
    model: nn.Module, targets: Sequence[Target], *, cache_dir: str | Path | None = None, progress: Progress = False
) -> dict[str, Protected]:
    """Return the protected directions of the targets whose rule says so, by path, from the base weights of `model`.

    Those of a quantised weight are of the weight as it is. All processes get the bits of the first. Raises AdapterError
    under ZeRO-3, and WeightError for weights that cannot be decomposed.
    """
    wanted = [(t, t.protect) for t in targets if t.protect is not None]
    if wanted and is_deepspeed_zero3_enabled():
        raise AdapterError(
            "protect: ZeRO-3 shares out the factors, which cannot be kept outside then: train without it"
        )
    found = {}
    hidden = not wanted or not progress or rank_and_world_size()[0] > 0
    for target, protect in tqdm(wanted, desc="protecting", unit="matrix", file=sys.stderr, disable=hidden):
        W = read_matrix(base_layer(model, target.path))
        cache = None if cache_dir is None else Path(cache_dir)
        factors = cached_factors(W, protect.top, "principal", path=target.path, cache=cache)
        energy = float(factors.S.double().square().sum()) / factors.norm**2 if factors.norm > 0 else 0.0
        U, V = (from_first_rank(half.contiguous()) for half in (factors.U, factors.Vh.T))
        found[target.path] = Protected(target.path, protect, U, V, energy)
    return found


def kept_outside(initial: Mapping[str, Initial], protected: Mapping[str, Protected]) -> dict[str, Initial]:
    """Return the anchors, those under a hard constraint in float32 and without what rounding has put inside."""
    hard = {path: found for path, found in protected.items() if found.protect.is_hard and path in initial}
    made = dict(initial)
    for path, found in hard.items():
        A0, B0 = (found.outside(half, axis) for axis, half in enumerate((initial[path].A0, initial[path].B0)))
        made[path] = replace(initial[path], A0=A0, B0=B0)
    return made
