"""Fixed A, the default: a LoRA whose down factor never changes, so its update stays off the protected inputs.

    y = W x + s B A x          A (r, in) is a buffer with A V = 0, B (out, r) trains from zero

V (in, k) holds the input directions that ordinary text and pictures use (`milora_vl/core/calibration`). The rows of A
are the right singular vectors of a method's triplets, for MiLoRA the last r (arXiv:2406.09044), or random,
times I - V V', of one length. LoRA-Null (arXiv:2503.02659) fixes A off the inputs of a base too, InfLoRA
(arXiv:2404.00228) off earlier tasks'. The update s B A vanishes on them at every step by construction: under
any optimizer and in any trainer, without a hook and without V in memory. B alone trains, so equal trained parameters
need a higher rank.

PEFT creates a stock LoRA, and `fix_A` makes its A a buffer of the same name. A buffer, because PEFT switches
`requires_grad` on for each parameter of an adapter. Files, state dicts, merging and the PeftModel are PEFT's own.

>>> from peft import LoraConfig, get_peft_model
>>> from torch import nn
>>> model = get_peft_model(nn.Sequential(nn.Linear(3, 4)), LoraConfig(r=2, target_modules=["0"]))
>>> layer = model.base_model.model[0]
>>> fix_A(layer, "default", torch.ones(2, 3))
>>> [name for name, p in layer.named_parameters() if p.requires_grad]
['lora_B.default.weight']
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from pydantic import TypeAdapter
from torch import Tensor, autocast, nn

from milora_vl.common.compat.peft import ForwardVariant, set_variant
from milora_vl.core.adapter.initialize import WeightError, seed_of
from milora_vl.core.calibration import VERSION
from milora_vl.core.calibration.activations import for_each_input
from milora_vl.core.calibration.bases import Calibration, CalibrationError, InputBasis, sources_of
from milora_vl.core.policy.rules import Target
from milora_vl.core.svd import decompose
from milora_vl.core.svd.gram import full_precision
from milora_vl.core.weights.distributed import broadcast, gather_objects, rank_and_world_size
from milora_vl.core.weights.matrices import as_rows
from milora_vl.core.weights.tensor_files import read_cached, shared_digest, write_cached


def fix_A(layer: LoraLayer, adapter: str, A: Tensor | None = None) -> None:
    """Make the A of an adapter a buffer that never changes: `A` (r, in), or the A that the layer has."""
    down = layer.lora_A[adapter]
    stock = down.get_parameter("weight")
    A = stock.detach() if A is None else A.to(stock).reshape(stock.shape).contiguous()  # the kernels of a convolution
    del down.weight
    down.register_buffer("weight", A)
    if type(layer) is lora.Linear:  # a quantized layer or a subclass keeps its own forward
        set_variant(layer, adapter, FixedA())


def has_fixed_A(layer: LoraLayer, adapter: str) -> bool:
    return adapter in layer.lora_A and "weight" in dict(layer.lora_A[adapter].named_buffers(recurse=False))


class FixedA(ForwardVariant):
    """The forward pass of PEFT's LoRA layer, where the product with B adds to W x.

    A passes no gradient, so x is not kept for the backward pass. Beside a bfloat16 base PEFT would multiply in float32,
    and round the sum anyway; x, in bfloat16, has left its own directions by as much as the rounded A has. Beside
    float16 the products are in float32, as PEFT's, under autocast too.
    """

    def update(self, down: Any, up: Any, x: Tensor, onto: Tensor, scaling: float, drops: bool) -> Tensor:
        """Return y = W x + s B A x for `onto` (..., out), the output W x of the base layer."""
        # PEFT has cast x, which the dtype of `onto` undoes; dropout divides by 1 - p, in float32
        return plus_update(onto, x, down.weight, up.weight, scaling, x.dtype if drops else onto.dtype)


def plus_update(onto: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, first: torch.dtype) -> Tensor:
    """Return `onto` + s B A x in the dtype of `onto` (..., out); `first` is the dtype of A x without autocast."""
    device = onto.device.type
    if onto.dtype == torch.float16:  # A x can leave its range, and infinity times B = 0 is NaN
        first = dtype = torch.float32
    elif torch.is_autocast_enabled(device):
        first = dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.bfloat16 if onto.dtype == torch.bfloat16 else B.dtype
    with autocast(device, enabled=False):
        hidden, B = as_rows(F.linear(x.to(first), A.to(first))).to(dtype), B.to(dtype)
        if onto.dtype == dtype:
            return torch.addmm(as_rows(onto), hidden, B.T, alpha=scaling).view(onto.shape)
        return (onto + scaling * F.linear(hidden, B).view(onto.shape)).to(onto.dtype)


# Four times the length that PEFT's LoRA starts with in every layer: minor directions learn best at four times the
# learning rate there (docs/results.md), so that the rate of a LoRA suits them.
ROW_LENGTH = 4 * 3**-0.5
LARGEST_OVERLAP = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """How one layer is protected.

    - `directions`: the number k of protected input directions, of `inputs` in total.
    - `energy`: the share of the layer's input energy that they hold on calibration data: at least the rule's `protect`,
      or what leaves as many other directions as the rank.
    - `held_out`: the same on calibration data that did not choose them; None without such data.
    - `positions`: the number of input vectors that chose them.
    - `kept`: the mean share of the start's rows that lies off the protected directions.
    - `overlap`: ||A V|| / ||A|| at the start; rounding alone.
    """

    directions: int
    inputs: int
    energy: float
    held_out: float | None
    positions: int
    kept: float
    overlap: float


def make_A(target: Target, W: Tensor, inputs: InputBasis) -> tuple[Tensor, Protection]:
    """Return A (r, in) in float32 of a layer with weight W (out, in) off its protected inputs, and its protection.

    The rows are the right singular vectors of the method's triplets, or random for a method without triplets.
    Raises WeightError for a weight that cannot be decomposed.
    """
    assert target.rank is not None
    if target.part is None:
        generator = torch.Generator().manual_seed(zlib.crc32(target.path.encode(), target.seed))
        rows = torch.randn(target.rank, target.shape[1], generator=generator)
    else:
        generator = torch.Generator().manual_seed(seed_of(target))
        try:
            rows = decompose(W, target.rank, target.part, generator=generator, refines_left=False).Vh
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise WeightError(str(error), where=target.path) from error
    A, kept = off_inputs(rows.to(inputs.V), inputs.V)
    inside = overlap(A, inputs.V)
    if inside > LARGEST_OVERLAP:
        message = f"A has {inside:.1e} of its length along protected inputs; rounding alone leaves less than 1e-5"
        raise CalibrationError(message, where=target.path, hint="the eigenvectors of this device are not orthonormal")
    return A, Protection(
        directions=inputs.V.shape[1], inputs=len(inputs.V), energy=inputs.share, held_out=inputs.held_out,
        positions=inputs.num_positions, kept=kept, overlap=inside,
    )  # fmt: skip


def protect(
    model: nn.Module,
    targets: Sequence[Target],
    calibration: Calibration | None,
    cache_dir: str | Path | None,
    *,
    weights: str | None = None,
    is_shown: bool = False,
) -> dict[str, tuple[Tensor, Protection]]:
    """Return A (r, in) of every target with `protect`, and its protection: made in one process, the same in all.

    Devices differ in the signs and in the order of nearly equal directions, and gradients of B add up only for one A.
    `weights` is the key of the model if it is known, and `is_shown` shows a progress bar, or the file of the cache, on
    stderr. Warns about layers that protect less than asked or almost nothing, and about too little data.
    """
    fixed = [target for target in targets if target.has_fixed_A]
    if calibration is None or not fixed:
        return {}
    is_first = rank_and_world_size()[0] == 0
    key = "" if cache_dir is None else calibration_key(model, fixed, calibration, weights)
    file = Path(cache_dir or "") / f"{key}.safetensors"
    factors, stored = (_read(file, fixed) if key and is_first else None) or ({}, None)  # each node has its own cache
    found = gather_objects(stored)[:1]
    if found == [None]:
        made = for_each_input(model, fixed, calibration, make_A, is_shown=is_shown)
        factors = {path: A for path, (A, _) in made.items()}
        found = gather_objects({path: about for path, (_, about) in made.items()})
    elif is_shown and is_first:
        sys.stderr.write(f"the calibration of an earlier start is used ({file})\n")
    owners = {path: rank for rank, part in enumerate(found) for path in part}
    about = {t.path: found[owners[t.path]][t.path] for t in fixed}
    device = next(model.parameters()).device
    for t in fixed:
        A = broadcast(factors.get(t.path), (t.rank or 0, t.shape[1]), torch.float32, device, owners[t.path])
        factors[t.path] = A.to(device)
    if is_first:
        _warn(fixed, about)
        if key and stored is None:
            content = {path: asdict(one) for path, one in about.items()}
            write_cached(file.parent, key, factors, {"content": json.dumps(content)})
    return {t.path: (factors[t.path], about[t.path]) for t in fixed}


LEAST_HELD_OUT = 0.5  # of the share; a layer that holds less of held-out energy than this gets a warning
FEWEST = 0.01  # a layer that protects a smaller share of its input directions than this gets a warning


def _warn(targets: Sequence[Target], about: Mapping[str, Protection]) -> None:
    """Warn about layers that protect almost nothing, or less than their rule asks for, and about too little data.

    With too little data, directions describe the calibration batches and not the inputs of the layer in general.
    """
    lowered = {t.path: about[t.path].energy for t in targets if about[t.path].energy < t.protect}
    unsure = [
        path
        for path, one in about.items()
        if (one.positions < one.inputs if one.held_out is None else one.held_out < LEAST_HELD_OUT * one.energy)
    ]
    for path in unsure[:1]:
        one = about[path]
        seen = "nothing was held out" if one.held_out is None else f"{one.held_out:.1%} on held-out data"
        warnings.warn(
            f"too little calibration data for {len(unsure):,} of {len(about):,} layers: {path} has {one.inputs:,} "
            f"inputs and {one.positions:,} positions; its directions hold {one.energy:.1%} of the activation "
            f"energy on them, and {seen}. Calibrate with more data.",
            stacklevel=4,
        )
    few = [path for path, one in about.items() if one.directions < FEWEST * one.inputs and path not in lowered]
    if few:
        one = about[few[0]]
        warnings.warn(
            f"{len(few):,} of {len(about):,} layers protect almost nothing: {few[0]} protects {one.directions} of "
            f"{one.inputs:,} input directions, which hold {one.energy:.1%} of its energy. Raise protect for them.",
            stacklevel=4,
        )
    if lowered:
        lowest = min(lowered, key=lambda path: lowered[path])
        warnings.warn(
            f"{len(lowered):,} of {len(about):,} layers protect less than their rule asks for, so that their rank "
            f"fits; the lowest share is {lowered[lowest]:.1%}, in {lowest}. A lower rank protects more.",
            stacklevel=4,
        )


def _read(file: Path, targets: Sequence[Target]) -> tuple[dict[str, Tensor], dict[str, Protection]] | None:
    """Return A and its protection by path; None for an entry that is missing or does not fit."""
    tensors, metadata = read_cached(file.parent, file.stem) or ({}, {})
    try:
        about = TypeAdapter(dict[str, Protection]).validate_json(metadata.get("content", ""), strict=True)
    except ValueError:
        return None
    wanted = {t.path: ((t.rank, t.shape[1]), torch.float32) for t in targets}
    fits = about.keys() == wanted.keys() and wanted == {path: (A.shape, A.dtype) for path, A in tensors.items()}
    return (tensors, about) if fits else None


def off_inputs(rows: Tensor, V: Tensor) -> tuple[Tensor, float]:
    """Return the rows (r, in) times I - V V', each of length ROW_LENGTH, and the mean share of them that is left.

    >>> A, kept = off_inputs(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
    >>> A, round(kept, 2)
    (tensor([[0.0000, 2.3094]]), 0.64)
    """
    rows = rows.float()
    with full_precision(rows.device):
        left = rows
        for _ in range(2):  # the second time removes what rounding left of the first
            left = left - (left @ V) @ V.T
    lengths = torch.linalg.vector_norm(left, dim=1, keepdim=True)
    before = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    share = (lengths / before.clamp(min=tiny)).square()
    return left * (ROW_LENGTH / lengths.clamp(min=tiny)), float(share.mean())


def overlap(A: Tensor, V: Tensor) -> float:
    """Return ||A V|| / ||A||, which is 0 if A (r, in) is off the directions V (in, k)."""
    with full_precision(A.device):
        inside, whole = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in (A.float() @ V, A))
    return float(inside / whole) if whole > 0 else 0.0


def calibration_key(
    model: nn.Module, targets: Sequence[Target], calibration: Calibration | None, weights: str | None = None
) -> str:
    """Return a hash of all that decides a fixed A: weights, rules and calibration. Every process calls this."""
    digest = hashlib.sha256(f"{VERSION}".encode())
    for t in targets:
        digest.update(f"{t.path} {t.tower} {t.method} {t.rank} {t.seed} {t.protect}\n".encode())
    content = BytesIO()
    sources = [] if calibration is None else sources_of(calibration)
    torch.save([[dict(batch) for batch in part] for part in sources], content)
    digest.update(xxhash.xxh3_128_digest(content.getbuffer()))
    digest.update((weights or shared_digest(model)).encode())
    return f"calibration-{digest.hexdigest()[:32]}"


def protected_directions(targets: Sequence[Target], protection: Mapping[str, Protection]) -> dict[str, float]:
    """Return the mean share of protected input directions in each tower."""
    shares: dict[str, list[float]] = {}
    for target in targets:
        if target.path in protection:
            entry = protection[target.path]
            shares.setdefault(target.tower or "other", []).append(entry.directions / entry.inputs)
    return {tower: round(sum(values) / len(values), 4) for tower, values in shares.items()}
