"""`Factors`: the chosen singular triplets of a weight, and the LoRA factors A0, B0 that they give."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Factors:
    """Singular triplets of W (out, in): U (out, r), S (r,) descending, Vh (r, in), with W Vh' = U S.

    - `index`: the positions of S among all singular values in descending order.
    - `norm`: ||W||_F.
    - `sigma_max`: the largest singular value of W; a lower estimate if `method` is gram or gram64.
    - `excess`: a bound on | ||S|| / ||S_true|| - 1 |, proved by the search; 0 is exact up to rounding of the dtype.
    - `method`: `exact` (LAPACK or cuSOLVER), `eigh` (all eigenvectors of a float64 Gram matrix), `gram` or `gram64` (a
      few eigenvectors of a Gram matrix in float32 or float64).
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    index: Tensor
    norm: float
    sigma_max: float
    excess: float
    method: str

    def lora(self, scaling: float) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) with `scaling * B @ A` equal to U S Vh (arXiv:2406.09044, eq. 4 and 5).

        A = sqrt(S / scaling) Vh and B = U sqrt(S / scaling), as in the official script. `scaling` is alpha / r.
        Raises ValueError if `scaling` is not a positive number.

        >>> import torch
        >>> from milora_vl.core.svd import decompose
        >>> f = decompose(torch.diag(torch.tensor([9.0, 4.0, 2.0])), rank=1)
        >>> A, B = f.lora(scaling=2.0)
        >>> [round(x, 6) for x in (2.0 * B @ A).diagonal().tolist()]
        [0.0, 0.0, 2.0]
        """
        if not 0 < scaling < float("inf"):
            raise ValueError(f"scaling must be a positive number, got {scaling}")
        root = (self.S / scaling).sqrt()
        return (root[:, None] * self.Vh).contiguous(), (self.U * root).contiguous()
