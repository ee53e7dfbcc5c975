"""The choice of a fixed A: rows off the protected inputs of a layer, of one length, and how well they protect it.

V (in, k) holds the input directions that ordinary text and pictures use (`milora_vl/core/calibration`). The rows are
the first right singular vectors of the task's gradient, those of a method's triplets, or random, times I - V V'.
`fixed_a.py` has the layer. B alone trains there, so equal trained parameters need a higher rank.
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
from transformers.integrations import is_deepspeed_zero3_enabled

from milora_vl.core.adapter.errors import AdapterError
from milora_vl.core.calibration.bases import Batches, Calibration, ProtectedInputs
from milora_vl.core.calibration.cache import calibration_key, read_entry, write_entry
from milora_vl.core.init.initialize import Initial
from milora_vl.core.policy.rules import Target
from milora_vl.core.svd.precision import full_precision
from milora_vl.core.weights.distributed import broadcast, gather, rank_and_world_size

# Twice the length that PEFT's LoRA starts with in every layer: a fixed A learns best at twice the learning rate
# (docs/studies/fixed-a.md), so that the rate of a LoRA suits it.
ROW_LENGTH = 2 * 3**-0.5
LARGEST_OVERLAP = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """How one layer is protected.

    - `directions`: the number k of protected input directions, of `inputs` in total.
    - `energy`: the share of the layer's input energy that they hold on calibration data: at least the rule's `protect`,
      or what leaves as many other directions as the rank.
    - `held_out`: the same on calibration data that did not choose them; None without such data.
    - `kept`: the mean share of the start's rows, or of the task's gradient, that lies off the protected directions.
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
    sketches: Mapping[str, Tensor],
    inputs: ProtectedInputs | None,
) -> tuple[dict[str, Tensor], dict[str, Protection]]:
    """Return A (r, in) in float32 of every target with a fixed A, and the protection of each with protected inputs.

    The rows are the right singular vectors in `initial`, the first ones of the task's gradient in `sketches`, or random
    for a method that has neither.
    """
    factors, protections = {}, {}
    for target in targets:
        if not target.has_fixed_A:
            continue
        start = sketches.get(target.path)
        if start is None:
            start = initial[target.path].A0 if target.is_decomposed else _random_rows(target)
        basis = inputs.of(target.path) if inputs is not None and target.protect else None
        V = start.new_zeros(target.shape[1], 0) if basis is None else basis.V
        V = V.to(start.device, torch.float32)
        A, kept = first_rows_off(start, V, target.rank) if target.path in sketches else off_inputs(start, V)
        factors[target.path] = A
        if basis is None:
            continue
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


def cached_factors(
    model: nn.Module,
    targets: Sequence[Target],
    calibration: Calibration | None,
    task: Batches | None,
    cache_dir: str | Path | None,
    choose: Callable[[], tuple[dict[str, Tensor], dict[str, Protection]]],
    *,
    is_shown: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Protection]]:
    """Return what `choose` returns, the same in every process, from the cache if the first process has it there.

    An entry repeats the warnings of its calibration; `is_shown` names its file on stderr. There is no cache under
    ZeRO-3, which partitions the weights that decide the entry.
    """
    fixed = [target for target in targets if target.has_fixed_A]
    if cache_dir is None or not fixed or is_deepspeed_zero3_enabled():
        return choose()
    folder, entry, key = Path(cache_dir), None, ""
    is_first = rank_and_world_size()[0] == 0
    if is_first:  # alone: each node may have a cache of its own, with other bits
        key = calibration_key(model, fixed, calibration, task)
        entry = read_entry(folder, key)
    content = gather(None if entry is None else entry[1])[0]
    if content is None:
        with warnings.catch_warnings(record=True) as caught:
            factors, protections = choose()
        for one in caught:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        if is_first:
            notes = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
            try:
                described = {path: asdict(protection) for path, protection in protections.items()}
                write_entry(folder, key, factors, {"protection": described, "warnings": notes})
            except OSError as error:
                warnings.warn(f"what the calibration chose is not cached in {folder}: {error}", stacklevel=4)
    else:
        if is_shown and is_first:
            sys.stderr.write(f"the calibration of an earlier start is used ({folder}/calibration-{key}.safetensors)\n")
        device = next(model.parameters()).device
        protections = {path: Protection(**values) for path, values in content["protection"].items()}
        shapes = {target.path: (target.rank or 0, target.shape[1]) for target in fixed}
        stored = {path: None if entry is None else entry[0][path].to(device) for path in shapes}
        factors = {
            path: broadcast(stored[path], shape, torch.float32, device, owner=0) for path, shape in shapes.items()
        }
        for note in content["warnings"] if is_first else ():
            warnings.warn(note, stacklevel=4)
    return factors, protections


def first_rows_off(sketch: Tensor, V: Tensor, rank: int | None) -> tuple[Tensor, float]:
    """Return the first `rank` right singular vectors of a sketch (m, in) times I - V V', of length ROW_LENGTH.

    The second value is the share of the sketch's energy off V.
    """
    rows = sketch.float()
    with full_precision(rows.device):
        left = rows - (rows @ V) @ V.T
        A, _ = off_inputs(torch.linalg.svd(left, full_matrices=False).Vh[:rank], V)
    return A, float(left.square().sum() / rows.square().sum().clamp(min=torch.finfo(torch.float32).tiny))


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
