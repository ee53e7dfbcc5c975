"""The spectrum of a base weight in numbers: how much its minor part holds, how it decays, how many directions count."""

from __future__ import annotations

import torch
from torch import Tensor


def minor_energy(sigma: Tensor, rank: int) -> float:
    """Return the share of ||W||_F^2 that the last `rank` singular values hold; `sigma` is descending.

    >>> minor_energy(torch.tensor([3.0, 1.0]), 1)
    0.1
    """
    squares = sigma.double().square()
    total = float(squares.sum())
    return float(squares[max(0, len(squares) - rank) :].sum()) / total if total else 0.0


def effective_rank(sigma: Tensor) -> float:
    """Return exp(H(p)), H the entropy of p = sigma / sum(sigma) (Roy and Vetterli 2007); 0 for a zero matrix.

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])), 6)
    3.0
    """
    values = sigma.double()
    total = values.sum()
    if total == 0:
        return 0.0
    p = values[values > 0] / total
    return float((-(p * p.log()).sum()).exp())


def stable_rank(sigma: Tensor) -> float:
    """Return ||W||_F^2 / sigma_1^2; 0 for a zero matrix."""
    values = sigma.double()
    return float(values.square().sum() / values[0].square()) if values[0] > 0 else 0.0


def condition_number(sigma: Tensor) -> float | None:
    """Return sigma_1 / sigma_k; None where the last is zero to the rounding of float32 (1e-7 sigma_1)."""
    first, last = float(sigma[0]), float(sigma[-1])
    return first / last if last > 1e-7 * first else None


def decay_exponent(sigma: Tensor) -> float | None:
    """Return a of sigma_i ~ i^-a, by least squares of log sigma on log i over the first half of the components.

    The second half is left out: there every finite matrix falls off, whatever its power law. None for fewer than four
    components, or zeros among them.

    >>> round(decay_exponent(torch.arange(1, 101).double() ** -0.7), 6)
    0.7
    """
    values = sigma.double()[: -(-len(sigma) // 2)]
    if len(values) < 4 or float(values[-1]) <= 1e-7 * float(values[0]):
        return None
    x, y = torch.arange(1, len(values) + 1).double().log(), values.cpu().log()
    x = x - x.mean()
    return float(-(x * y).sum() / x.square().sum())
