"""Does the decay of a layer's spectrum predict how much its adapter helps? The study has one arm per layer.

The help of a layer is the decrease of the validation loss from training its adapter alone, relative to the arm `none`,
which trains only the parts that all arms share. The relation need not be linear, so rank correlation is used. It is
computed for all layers and for each kind of layer (its name): kinds differ in both variables, and this alone
can cause a correlation over all layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from milora_vl.analyze.measures import decay_exponent, effective_rank, minor_energy
from milora_vl.sweep.cells import Cell
from milora_vl.sweep.results import Result, arms
from milora_vl.weights.matrices import read_matrix

NONE = "none"
MEASURES = ("decay", "effective_rank", "minor_energy")
_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: its path and kind, the shape of its spectrum, and the decrease of the validation loss (`help`)."""

    path: str
    kind: str
    decay: float
    effective_rank: float  # divided by the number of singular values
    minor_energy: float
    help: float


@dataclass(frozen=True, slots=True)
class Correlation:
    """Spearman's rho of a measure and the help over n layers, with a 95 % bootstrap interval over layers."""

    measure: str
    kind: str
    rho: float
    low: float
    high: float
    n: int


def layers(model: nn.Module, results: Mapping[Cell, Result], seeds: int, rank: int) -> list[Layer]:
    """Join the arms that are module paths with the spectra of `model`. Raises ValueError without a finished `none`."""
    best = {arm.label: arm.best for arm in arms(results, seeds) if arm.best}
    if NONE not in best:
        raise ValueError(f"no finished arm {NONE!r} to compare the layers with")
    start = best[NONE].validation.value
    joined = []
    for path, point in best.items():
        if path == NONE:
            continue
        sigma = torch.linalg.svdvals(read_matrix(model.get_submodule(path)).double())
        decay = decay_exponent(sigma)
        if decay is not None:
            share = effective_rank(sigma) / len(sigma)
            helped = start - point.validation.value
            joined.append(Layer(path, _kind(path), decay, share, minor_energy(sigma, rank), helped))
    return joined


def correlations(of_layers: Sequence[Layer]) -> list[Correlation]:
    """Return the correlation of each measure with the help: over all layers, then per kind with five or more layers."""
    counts = Counter(layer.kind for layer in of_layers)
    groups = {"all": list(of_layers)} | {
        kind: [layer for layer in of_layers if layer.kind == kind] for kind, n in counts.items() if n >= 5
    }
    return [_correlation(measure, kind, group) for measure in MEASURES for kind, group in groups.items()]


def spearman(x: Tensor, y: Tensor) -> float:
    """Return Spearman's rank correlation of two vectors; ties get their mean rank, a constant vector gives 0.

    >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 9.0])), 6)
    1.0
    """
    a, b = (_ranks(values) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm else 0.0


def _correlation(measure: str, kind: str, group: Sequence[Layer]) -> Correlation:
    x = torch.tensor([getattr(layer, measure) for layer in group], dtype=torch.float64)
    y = torch.tensor([layer.help for layer in group], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(group), (_DRAWS, len(group)), generator=generator)
    values = torch.tensor([spearman(x[one], y[one]) for one in drawn], dtype=torch.float64)
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Correlation(measure, kind, spearman(x, y), low, high, len(group))


def _ranks(values: Tensor) -> Tensor:
    less = (values[:, None] > values[None, :]).sum(1)
    same = (values[:, None] == values[None, :]).sum(1)
    return less.double() + (same.double() - 1) / 2


def _kind(path: str) -> str:
    """Return the kind of a layer: the part of its path after the last number."""
    parts = path.split(".")
    last = max((place for place, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])
