"""The protected input directions of a layer: eigenvectors of C that hold a share of its energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_vl.common.errors import UserError
from milora_vl.core.svd.precision import full_precision


class CalibrationError(UserError):
    """A calibration that cannot find protected inputs. `where` is a module path or a file."""


@dataclass(frozen=True, slots=True, eq=False)
class InputBasis:
    """The protected directions of one layer input; layers that read the same input share one object.

    - `V`: (in, k) orthonormal in float32, on the CPU.
    - `size`: the number of input directions, `in`.
    - `share`: the share of the activation energy trace(C) that V holds.
    - `held_out`: the same share on calibration batches that C does not contain; None without such batches.
    - `num_positions`: the number of input vectors in C; None if the file does not say it.
    """

    V: Tensor
    size: int
    share: float
    held_out: float | None = None
    num_positions: int | None = None

    @property
    def num_directions(self) -> int:
        """Return k."""
        return self.V.shape[-1]


@dataclass(frozen=True)
class ProtectedInputs:
    """The protected inputs of a model: `bases`, and the number of the basis of each module by path."""

    bases: Sequence[InputBasis]
    numbers: Mapping[str, int]

    def of(self, path: str) -> InputBasis:
        """Return the basis of the module at `path`."""
        return self.bases[self.numbers[path]]


def first_directions(C: Tensor, share: float) -> tuple[Tensor, float]:
    """Return V (in, k), the fewest eigenvectors of C (in, in) that hold `share` of its trace, and the share they hold.

    C is symmetric and has no negative eigenvalues. Raises torch.linalg.LinAlgError if the decomposition fails.

    >>> first_directions(torch.diag(torch.tensor([1.0, 6.0, 3.0])), 0.9)[0].abs()
    tensor([[0., 0.],
            [1., 0.],
            [0., 1.]])
    """
    total = float(C.diagonal().sum(dtype=torch.float64))
    if total <= 0:
        return C.new_zeros(len(C), 0, dtype=torch.float32), 1.0
    with full_precision(C.device):
        values, vectors = (half.flip(-1) for half in torch.linalg.eigh(C))
    held = values.double().clamp(min=0).cumsum(0).cpu() / total
    count = min(int((held < share).sum()) + 1, len(held))
    return vectors[:, :count].float().contiguous(), min(float(held[count - 1]), 1.0)


def require_free_directions(ranks: Mapping[str, int], protected: ProtectedInputs) -> None:
    """Raise CalibrationError for modules with fewer unprotected input directions than their rank."""
    bases = {path: protected.of(path) for path in ranks}
    short = {p: b for p, b in bases.items() if b.size - b.num_directions < ranks[p]}
    if not short:
        return
    lines = [
        f"{path}: {basis.size - basis.num_directions} of {basis.size} free, rank {ranks[path]}"
        for path, basis in short.items()
    ]
    more = [f"... and {len(lines) - 5:,} more"] if len(lines) > 5 else []
    hint = "lower protect, or the rank"
    raise CalibrationError(
        "\n".join([f"fewer free input directions than the rank in {len(short):,} layers", *lines[:5], *more]),
        code="protect-rank-too-large",
        where="protect",
        hint=hint,
    )
