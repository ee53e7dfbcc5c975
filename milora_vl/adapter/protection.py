"""Protected inputs: the input directions V that an update avoids, and what is removed from its factors, A (I - V V').

V (in, k) holds the inputs of a layer that ordinary text and pictures use (`milora_vl/calibration`). The update vanishes
on them, (B A - B0 A0) V = 0, if A V = A0 V = 0. The anchor starts as A0 (I - V V'), and `keep_protected.py` keeps the
trained A that way. `policy/rules.py` describes the field `protect` of a rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from milora_vl.adapter.errors import AdapterError
from milora_vl.calibration.bases import ProtectedInputs
from milora_vl.factors.initialize import Initial, LayerReport
from milora_vl.policy.rules import Protect, Target
from milora_vl.svd.precision import full_precision
from milora_vl.weights.distributed import is_sharded

ROUNDING = 1e-4  # float32 training leaves at most this overlap; half precision leaves its own rounding error


@dataclass(slots=True, eq=False)
class Directions:
    """Protected directions: `basis` (in, k) is orthonormal, or holds the ids (k,) of embedded tokens.

    Layers that read the same input share one object, and so its memory. The basis moves to the device of the factors,
    unless it `stays`: then only a copy goes there, for the time of one product.
    """

    basis: Tensor
    stays: bool = False

    def component(self, rows: Tensor) -> Tensor:
        """Return the component of each row of (m, in) in these directions, in float32 or float64."""
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
    """The protected inputs of the layer at `path`.

    `energy` is their share of the activation energy, `held_out` the same on held-out text. `is_kept` is True once
    `keep_protected` has registered an optimizer, and until another one steps.
    """

    path: str
    protect: Protect
    directions: Directions
    energy: float
    held_out: float | None = None
    is_kept: bool = False

    @property
    def V(self) -> Tensor:
        """Return the protected input directions (in, k)."""
        return self.directions.basis

    @property
    def num_directions(self) -> int:
        """Return k."""
        return self.V.shape[-1]

    @property
    def num_bytes(self) -> int:
        """Return the memory of V in bytes."""
        return self.V.nbytes

    def inside(self, A: Tensor) -> Tensor:
        """Return A V V', the component of an input factor in the protected directions, in its shape."""
        with full_precision(A.device):
            return self.directions.component(A.detach().flatten(1)).reshape(A.shape)

    def outside(self, A: Tensor) -> Tensor:
        """Return A (I - V V') in float32 or float64."""
        return A.detach() - self.inside(A)

    @torch.no_grad()
    def remove(self, A: Tensor) -> None:
        """Subtract the component in the protected directions from A, in place."""
        A.sub_(self.inside(A))

    def overlap(self, A: Tensor) -> float:
        """Return ||A V|| / ||A||: 0 if A is orthogonal to the protected directions."""
        part, whole = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in (self.inside(A), A.detach()))
        return float(part / whole) if whole > 0 else 0.0

    def is_violated_by(self, A: Tensor) -> bool:
        """Return True if A reaches into the protected directions by more than rounding. Shards never do."""
        return not is_sharded(A) and self.overlap(A) > max(ROUNDING, 2 * torch.finfo(A.dtype).eps)

    def require_kept(self, _: Tensor) -> None:
        """Gradient hook: raise AdapterError unless `keep_protected` has registered the optimizer of the last step."""
        if not self.is_kept:
            raise AdapterError(
                f"the rule protects the {self.protect}, but no optimizer of this training keeps them protected",
                code="adapter-not-protected",
                where=self.path,
                hint="call  milora_vl.keep_protected(model, optimizer)  for every optimizer, before its first step",
            )


def find_protected(targets: Sequence[Target], inputs: ProtectedInputs | None) -> dict[str, Protected]:
    """Return the protected directions of all targets whose rule has `protect`, by path; `inputs` holds them."""
    shared: dict[tuple[int, bool], Directions] = {}  # layers that read the same input share its memory
    found = {}
    for target in targets:
        if target.protect is None:
            continue
        assert inputs is not None
        basis, offload = inputs.of(target.path), target.protect.offload
        directions = Directions(basis.V.cpu() if offload else basis.V, stays=offload)
        directions = shared.setdefault((inputs.numbers[target.path], offload), directions)
        found[target.path] = Protected(target.path, target.protect, directions, basis.share, basis.held_out)
    return found


def kept_outside(
    initial: Mapping[str, Initial], protected: Mapping[str, Protected], targets: Sequence[Target]
) -> dict[str, Initial]:
    """Return the anchors, with A0 projected out of the protected directions.

    A projected A0 is float32: rounding it to the base's dtype would put a component inside again. The reports describe
    the projected factors, and `kept` is the share of A0 that is left.
    """
    scalings = {target.path: target.scaling for target in targets if target.path in initial}
    anchors = dict(initial)
    for path in initial.keys() & protected.keys():
        A0 = protected[path].outside(initial[path].A0)
        report = replace(initial[path].report, protected=protected[path].num_directions)
        report = _measured_again(report, initial[path], A0, scalings[path])
        anchors[path] = replace(initial[path], A0=A0, report=report)
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
