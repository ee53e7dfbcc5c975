"""The protected input directions of a layer: eigenvectors of C that hold a share of its energy; frequent tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import xxhash
from torch import Tensor

from milora_vl.base.errors import UserError
from milora_vl.svd import decompose
from milora_vl.svd.precision import full_precision

FEW = 8  # a search for the first k of n eigenvectors is faster than a whole decomposition if n > FEW k
LARGE = 2048  # and if n is larger than this


class CalibrationError(UserError):
    """A calibration that cannot find protected inputs. `where` is a module path or a file."""


@dataclass(frozen=True, slots=True, eq=False)
class InputBasis:
    """The protected directions of one layer input; layers that read the same input share one object.

    - `V`: (in, k) orthonormal in float32, or for an embedding the ids (k,) of its protected tokens.
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

    @property
    def num_bytes(self) -> int:
        """Return the memory of all bases in bytes."""
        return sum(basis.V.nbytes for basis in self.bases)

    @cached_property
    def digest(self) -> str:
        """Return a hash of all directions, by which checkpoints refer to them. Module paths do not enter it."""
        digest = hashlib.sha256(json.dumps(sorted(self.numbers.values())).encode())
        for basis in self.bases:
            values = basis.V.detach().cpu().contiguous()
            digest.update(f"{tuple(values.shape)} {values.dtype} {basis.size}".encode())
            digest.update(xxhash.xxh3_128_digest(values.reshape(-1).view(torch.uint8).numpy().data))
        return digest.hexdigest()[:16]


def first_directions(C: Tensor, share: float, limit: int | None) -> tuple[Tensor, float]:
    """Return V (in, k), the fewest eigenvectors of C (in, in) that hold `share` of its trace, and the share they hold.

    `limit` is the largest k. C is symmetric and has no negative eigenvalues. Raises torch.linalg.LinAlgError if the
    decomposition fails.

    >>> first_directions(torch.diag(torch.tensor([1.0, 6.0, 3.0])), 0.9, None)[0].abs()
    tensor([[0., 0.],
            [1., 0.],
            [0., 1.]])
    """
    total = float(C.diagonal().sum(dtype=torch.float64))
    if total <= 0:
        return C.new_zeros(len(C), 0, dtype=torch.float32), 1.0
    with full_precision(C.device):
        if limit is not None and len(C) > max(LARGE, FEW * limit):
            factors = decompose(C, limit, "principal")
            values, vectors = factors.S, torch.linalg.qr(factors.Vh.T.double()).Q  # orthonormal in float32, not to 2e-6
        else:
            values, vectors = (half.flip(-1) for half in torch.linalg.eigh(C))
    held = values.double().clamp(min=0).cumsum(0).cpu() / total
    count = min(int((held < share).sum()) + 1, len(held), limit or len(held))
    return vectors[:, :count].float().contiguous(), min(float(held[count - 1]), 1.0)


def first_tokens(counts: Tensor, share: float, limit: int | None) -> tuple[Tensor, float]:
    """Return the ids (k,) of the most frequent tokens, the fewest that make up `share` of `counts`, and their share.

    >>> first_tokens(torch.tensor([1.0, 6.0, 3.0]), 0.9, None)[0]
    tensor([1, 2])
    """
    if not bool(counts.sum() > 0):
        return torch.zeros(0, dtype=torch.long), 1.0
    values, ids = counts.double().cpu().sort(descending=True, stable=True)
    held = values.cumsum(0) / values.sum()
    count = min(int((held < share - 1e-12).sum()) + 1, int((values > 0).sum()), limit or len(held))
    return ids[:count].contiguous(), float(held[count - 1])


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
    largest = min(basis.size - ranks[path] for path, basis in short.items())
    hint = f"lower inputs, or set  max: {largest}  beside it" if largest > 0 else "lower the rank"
    raise CalibrationError(
        "\n".join([f"fewer free input directions than the rank in {len(short):,} layers", *lines[:5], *more]),
        code="protect-rank-too-large",
        where="protect",
        hint=hint,
    )
