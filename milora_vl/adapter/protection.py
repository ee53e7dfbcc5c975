"""Which directions an adapter protects, what is removed from its factors (I - V V'), and how its overlap is measured.

They are the first k singular directions of a weight, on both sides, or the inputs of a layer that ordinary text and
pictures use, on the input side alone (`milora_vl/calibration`).

For singular directions V (in, k) and U (out, k) hold the right and left singular vectors. The update B A - B0 A0
vanishes on them,

    (B A - B0 A0) V = 0    and    U' (B A - B0 A0) = 0,

if A V = A0 V = 0 and U'B = U'B0 = 0. `keep_protected.py` keeps A and B that way while they train. Minor anchors are
orthogonal to V and U by construction, up to rounding, which `kept_outside` removes. For protected inputs there is no U,
and any anchor is projected: A0 starts as A0 (I - V V'). `policy/rules.py` describes the field `protect` of a rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from milora_vl.adapter.errors import AdapterError
from milora_vl.adapter.install import base_layer
from milora_vl.calibration.bases import ProtectedInputs
from milora_vl.factors.initialize import Initial, LayerReport, Progress, cached_factors, matrix_bar
from milora_vl.policy.rules import Protect, Target
from milora_vl.svd.precision import full_precision
from milora_vl.weights.distributed import from_first_rank, rank_and_world_size
from milora_vl.weights.matrices import read_matrix
from milora_vl.weights.sharding import is_sharded

ROUNDING = 1e-4  # float32 training leaves at most this overlap; half precision leaves its own rounding error


@dataclass(slots=True, eq=False)
class Directions:
    """The protected directions of one side: `basis` (n, k) is orthonormal, or holds the ids (k,) of embedded tokens.

    Layers that read the same input share one object, and so its memory. The basis moves to the device of the factors,
    unless it `stays`: then only a copy goes there, for the time of one product.
    """

    basis: Tensor
    stays: bool = False

    def component(self, rows: Tensor) -> Tensor:
        """Return the component of each row of (m, n) in these directions, in float32 or float64."""
        basis = self.basis.to(rows.device)
        if not self.stays:
            self.basis = basis
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if basis.dim() == 1:
            return torch.zeros_like(rows).index_copy_(1, basis, rows[:, basis])
        basis = basis.to(rows.dtype)
        return (rows @ basis) @ basis.T


@dataclass(slots=True, eq=False)
class Protected:
    """The protected directions of the weight at `path`: V of its inputs, and U of its outputs or None.

    `energy` is their share of ||W||_F^2, or of the activation energy for protected inputs; `held_out` is the latter on
    held-out text. `is_kept` is True once `keep_protected` has registered an optimizer, and until another one steps.
    """

    path: str
    protect: Protect
    inputs: Directions
    outputs: Directions | None
    energy: float
    held_out: float | None = None
    is_kept: bool = False

    @property
    def V(self) -> Tensor:
        """Return the protected input directions (in, k)."""
        return self.inputs.basis

    @property
    def num_directions(self) -> int:
        """Return k."""
        return self.V.shape[-1]

    @property
    def num_bytes(self) -> int:
        """Return the memory of U and V in bytes."""
        return self.V.nbytes + (self.outputs.basis.nbytes if self.outputs is not None else 0)

    def inside(self, factor: Tensor, axis: int) -> Tensor:
        """Return the component of a factor in the protected directions, in its shape.

        That is A V V' for A (axis 0) and U U'B for B (axis 1), which is zero without U.
        """
        directions = (self.inputs, self.outputs)[axis]
        flat = factor.detach().flatten(1)
        if directions is None:
            return torch.zeros_like(factor)
        with full_precision(factor.device):
            component = directions.component(flat) if axis == 0 else directions.component(flat.T).T
            return component.reshape(factor.shape)

    def outside(self, factor: Tensor, axis: int) -> Tensor:
        """Return the factor without its component in the protected directions, in float32 or float64."""
        return factor.detach() - self.inside(factor, axis)

    @torch.no_grad()
    def remove(self, factors: Sequence[Tensor], shares: Sequence[float] = (1.0, 1.0)) -> None:
        """Subtract these shares of the protected components from A and B, in place."""
        for axis, (factor, share) in enumerate(zip(factors, shares, strict=True)):
            if axis == 0 or self.outputs is not None:
                factor.sub_(share * self.inside(factor, axis))

    def overlap(self, factors: Sequence[Tensor]) -> float:
        """Return the larger of ||A V|| / ||A|| and ||U'B|| / ||B||: 0 if both factors are orthogonal to them."""
        pairs = [(self.inside(factor, axis), factor.detach()) for axis, factor in enumerate(factors)]
        norms = [tuple(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in pair) for pair in pairs]
        return max(part / whole if whole > 0 else 0.0 for part, whole in norms)

    def is_violated_by(self, factors: Sequence[Tensor]) -> bool:
        """Return True if a hard constraint is violated by more than rounding. Shards violate none."""
        if any(is_sharded(factor) for factor in factors):
            return False
        allowed = max(ROUNDING, *(2 * torch.finfo(factor.dtype).eps for factor in factors))
        return self.protect.is_hard and self.overlap(factors) > allowed

    def require_kept(self, _: Tensor) -> None:
        """Gradient hook: raise AdapterError unless `keep_protected` has registered the optimizer of the last step."""
        if not self.is_kept:
            raise AdapterError(
                f"the rule protects the {self.protect}, but no optimizer of this training keeps them protected",
                code="adapter-not-protected",
                where=self.path,
                hint="call  milora_vl.keep_protected(model, optimizer)  for every optimizer, before its first step",
            )


@torch.no_grad()
def find_protected(
    model: nn.Module,
    targets: Sequence[Target],
    inputs: ProtectedInputs | None = None,
    *,
    cache_dir: str | Path | None = None,
    progress: Progress = False,
) -> dict[str, Protected]:
    """Return the protected directions of all targets whose rule has `protect`, by path.

    Singular directions come from the base weights of `model`, dequantized if necessary; `inputs` holds the protected
    inputs. All processes get identical bits from the first one. Raises WeightError for weights that cannot be
    decomposed.
    """
    protecting = [t for t in targets if t.protect is not None]
    directions = _singular_directions(model, protecting, cache_dir, progress)
    shared: dict[tuple[int, bool], Directions] = {}
    for target in protecting:
        if target.protect is not None and target.protect.inputs is not None:
            assert inputs is not None
            basis, offload = inputs.of(target.path), target.protect.offload
            key = (inputs.numbers[target.path], offload)
            if key not in shared:
                shared[key] = Directions(basis.V.cpu() if offload else basis.V, stays=offload)
            found = Protected(target.path, target.protect, shared[key], None, basis.share, basis.held_out)
            directions[target.path] = found
    return {target.path: directions[target.path] for target in protecting}


def _singular_directions(
    model: nn.Module, targets: Sequence[Target], cache_dir: str | Path | None, progress: Progress
) -> dict[str, Protected]:
    wanted = [(t, t.protect, t.protect.top) for t in targets if t.protect is not None and t.protect.top is not None]
    directions = {}
    with matrix_bar("protecting", len(wanted), is_shown=bool(progress) and rank_and_world_size()[0] == 0) as bar:
        for target, protect, top in wanted:
            W = read_matrix(base_layer(model, target.path))
            cache = None if cache_dir is None else Path(cache_dir)
            factors = cached_factors(W, top, "principal", path=target.path, cache=cache)
            energy = float(factors.S.double().square().sum()) / factors.norm**2 if factors.norm > 0 else 0.0
            U, V = (from_first_rank(half.contiguous()) for half in (factors.U, factors.Vh.T))
            directions[target.path] = Protected(target.path, protect, Directions(V), Directions(U), energy)
            bar.update()
    return directions


def kept_outside(
    initial: Mapping[str, Initial], protected: Mapping[str, Protected], targets: Sequence[Target]
) -> dict[str, Initial]:
    """Return the anchors, projected out of the protected directions where the constraint is hard.

    Projected anchors are float32: rounding them to the base's dtype would put a component inside again. With protected
    inputs the reports describe the projected factors, and `kept` is the share of A0 that is left.
    """
    scalings = {target.path: target.scaling for target in targets if target.path in initial}
    hard = {path: p for path, p in protected.items() if p.protect.is_hard and path in initial}
    anchors = dict(initial)
    for path, directions in hard.items():
        A0, B0 = (directions.outside(half, axis) for axis, half in enumerate((initial[path].A0, initial[path].B0)))
        report = replace(initial[path].report, protected=directions.num_directions)
        if directions.protect.kind == "inputs":
            report = _measured_again(report, initial[path], A0, scalings[path])
        anchors[path] = replace(initial[path], A0=A0, B0=B0, report=report)
    return anchors


def _measured_again(report: LayerReport, before: Initial, A0: Tensor, scaling: float) -> LayerReport:
    """Return the report with singular values and energy of s B0 A0 for the projected A0 (r, in), and the kept share."""
    with full_precision(A0.device):
        R = scaling * torch.linalg.qr(before.B0.double()).R  # Q R A0 has the singular values of R A0 (r, in)
        was, now = (torch.linalg.svdvals(R @ half.double()) for half in (before.A0, A0))
    norms = [float(half.double().square().sum()) for half in (before.A0, A0)]
    total = float(was.square().sum())
    return replace(
        report,
        sigma_min=float(now[-1]),
        sigma_max=float(now[0]),
        energy=report.energy * float(now.square().sum()) / total if total > 0 else report.energy,
        kept=norms[1] / norms[0] if norms[0] > 0 else 1.0,
    )
