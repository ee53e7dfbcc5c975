"""The choice of a fixed A: rows off the protected inputs of a layer, of one length, and how well they protect it.

V (in, k) holds the input directions that ordinary text and pictures use (`milora_vl/core/calibration`). The rows are
the right singular vectors of a method's triplets, for MiLoRA those of the last r (arXiv:2406.09044), or random, times
I - V V'. `fixed_a.py` has the layer. B alone trains there, so equal trained parameters need a higher rank.
"""

from __future__ import annotations

import sys
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from milora_vl.core.adapter.errors import AdapterError
from milora_vl.core.calibration.bases import Calibration, ProtectedInputs
from milora_vl.core.calibration.cache import calibration_key, read_entry, write_entry
from milora_vl.core.init.initialize import Initial
from milora_vl.core.policy.rules import Target
from milora_vl.core.svd.precision import full_precision
from milora_vl.core.weights.distributed import broadcast, gather, rank_and_world_size

# Four times the length that PEFT's LoRA starts with in every layer: minor directions learn best at four times the
# learning rate there (docs/studies/default.md), so that the rate of a LoRA suits them.
ROW_LENGTH = 4 * 3**-0.5
LARGEST_OVERLAP = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """How one layer is protected.

    - `directions`: the number k of protected input directions, of `inputs` in total.
    - `energy`: the share of the layer's input energy that they hold on calibration data: at least the rule's `protect`,
      or what leaves as many other directions as the rank.
    - `held_out`: the same on calibration data that did not choose them; None without such data.
    - `kept`: the mean share of the start's rows that lies off the protected directions.
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
    inputs: ProtectedInputs | None,
) -> tuple[dict[str, Tensor], dict[str, Protection]]:
    """Return A (r, in) in float32 of every target with `protect`, and the protection of each.

    The rows are the right singular vectors in `initial`, or random for a method without triplets.
    """
    factors, protections = {}, {}
    for target in targets:
        if not target.has_fixed_A:
            continue
        assert inputs is not None
        start = initial[target.path].A0 if target.is_decomposed else _random_rows(target)
        basis = inputs.of(target.path)
        V = basis.V.to(start.device, torch.float32)
        A, kept = off_inputs(start, V)
        factors[target.path] = A
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


def chosen_factors(
    model: nn.Module,
    targets: Sequence[Target],
    calibration: Calibration | None,
    cache_dir: str | Path | None,
    choose: Callable[[], tuple[dict[str, Tensor], dict[str, Protection]]],
    *,
    is_shown: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Protection]]:
    """Return what `choose` returns in the first process, from its cache if it has it there, in every process.

    Devices differ in the signs and in the order of nearly equal directions, and gradients of B add up only for one A.
    An entry repeats the warnings of its calibration; `is_shown` names its file on stderr.
    """
    fixed = [target for target in targets if target.has_fixed_A]
    if not fixed:
        return {}, {}
    is_first = rank_and_world_size()[0] == 0
    key = "" if cache_dir is None else calibration_key(model, fixed, calibration)
    folder = Path(cache_dir or "")
    entry = read_entry(folder, key) if key and is_first else None  # alone: each node may have a cache of its own
    content = gather(None if entry is None else entry[1])[0]
    device = next(model.parameters()).device
    if content is None:
        with warnings.catch_warnings(record=True) as caught:
            factors, protections = choose()
        notes = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
        for one in caught:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        if key and is_first:
            try:
                described = {path: asdict(protection) for path, protection in protections.items()}
                write_entry(folder, key, factors, {"protection": described, "warnings": notes})
            except OSError as error:
                warnings.warn(f"what the calibration chose is not cached in {folder}: {error}", stacklevel=4)
        protections = gather(protections)[0]
    else:
        if is_shown and is_first:
            sys.stderr.write(f"the calibration of an earlier start is used ({folder}/calibration-{key}.safetensors)\n")
        factors = {} if entry is None else entry[0]
        protections = {path: Protection(**values) for path, values in content["protection"].items()}
        for note in content["warnings"] if is_first else ():
            warnings.warn(note, stacklevel=4)
    shapes = {target.path: (target.rank or 0, target.shape[1]) for target in fixed}
    return {
        path: broadcast(factors.get(path), shape, torch.float32, device, owner=0).to(device)
        for path, shape in shapes.items()
    }, protections


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
