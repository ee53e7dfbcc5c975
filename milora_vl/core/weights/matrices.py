"""One weight of a model: the layer types that an adapter supports, a weight as a matrix (out, in), its fingerprint.

`read_matrix` returns the matrix of a plain weight, of a quantized one, and of a weight partitioned by ZeRO-3.

A fingerprint detects a base model that an adapter was not made for. It holds a few fixed random projections u' W v,
where the entries of u and v are +1 or -1, and the norm of W. Two roundings of one weight agree within the precision of
the coarser dtype; two different weights do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import zip_longest

import torch
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from milora_vl.common.errors import UserError
from milora_vl.core.svd import frobenius
from milora_vl.core.svd.gram import full_precision
from milora_vl.core.weights.distributed import Made, gather_objects, rank_and_world_size, result_or_error


def is_adaptable(module: nn.Module) -> bool:
    """Return True if adapters support this type of layer: Linear, GPT-2's Conv1D, Conv2d or Embedding."""
    return isinstance(module, nn.Linear | Conv1D | nn.Conv2d | nn.Embedding)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return (out, in) of the layer's matrix.

    The attributes of the module are used and not the shape of the weight, because quantized weights are packed and
    weights under ZeRO-3 are empty. A Conv2d has in = in_channels / groups * kh * kw, an Embedding (dim, tokens).
    """
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels // module.groups * math.prod(module.kernel_size)
    assert isinstance(module, nn.Embedding)
    return module.embedding_dim, module.num_embeddings


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the layer's `weight` as a matrix (out, in). The result is a view."""
    if isinstance(module, Conv1D | nn.Embedding):
        return weight.T
    return weight.flatten(1)


def as_rows(x: Tensor) -> Tensor:
    """Return the vectors (positions, n) of an input or an output (..., n) of a layer."""
    return x.reshape(-1, x.shape[-1])


def why_refused(module: nn.Module, method: str = "lora") -> str | None:
    """Return the kind of layer for which stock PEFT would compute this method wrongly, or None if it is correct."""
    if method not in ("lora", "dora") and isinstance(module, nn.Embedding):
        return f"an embedding with method {method}: use lora or full"
    if not isinstance(module, nn.Conv2d):
        return None
    if module.groups > 1:
        return f"a convolution in {module.groups} groups (PEFT cannot merge it)"
    if module.dilation != (1, 1) or module.padding_mode != "zeros":
        return f"a convolution with dilation {module.dilation}, padding {module.padding_mode} (PEFT ignores both)"
    return None


def read_matrix(module: nn.Module) -> Tensor:
    """Return the layer's weight (out, in), detached. It is a view of a plain weight, and a copy under ZeRO-3."""
    with torch.no_grad(), gather_params_ctx(list(module.parameters(recurse=False)), modifier_rank=None):
        weight = as_matrix(module, dequantize_module_weight(module).detach())
        return weight.clone() if is_deepspeed_zero3_enabled() else weight


def read_parameter(module: nn.Module, name: str) -> Tensor:
    """Return a parameter of `module` as a matrix (rows, columns), detached; a vector has one row."""
    if name == "weight" and is_adaptable(module):
        return read_matrix(module)
    parameter = module.get_parameter(name)
    with gather_params_ctx([parameter], modifier_rank=None):
        matrix = parameter.detach().reshape(-1, parameter.shape[-1] if parameter.ndim else 1).clone()
    return matrix if matrix.is_floating_point() else matrix.float()


def for_each_weight(
    model: nn.Module, queues: Sequence[Sequence[str]], make: Callable[[str, Tensor], Made]
) -> dict[str, Made]:
    """Return `make(path, W)` by path for the modules of this process; `queues` has the paths of each process.

    Under ZeRO-3 reading a weight gathers it, a collective operation: all processes go through the queues in step.
    An error of one process is raised in all of them, with its class if it is a UserError.
    """
    rank = rank_and_world_size()[0]
    made: dict[str, Made] = {}
    failure: UserError | None = None
    for paths in zip_longest(*queues):
        W = None
        for owner, path in enumerate(paths):
            if path is not None and (owner == rank or is_deepspeed_zero3_enabled()):
                whole = read_matrix(model.get_submodule(path))
                W = whole if owner == rank else W
        if W is not None and failure is None:
            outcome = result_or_error(partial(make, paths[rank], W))
            if isinstance(outcome, UserError):
                failure = outcome
            else:
                made[paths[rank]] = outcome
    gather_objects(failure)
    return made


def factor_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of the anchor: the weight's own, or float32 for quantized weights."""
    dtype = module.get_parameter("weight").dtype
    return dtype if dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16) else torch.float32


PROJECTIONS = 8
# Rounding changes a projection by about 0.3 eps ||W||_F; the largest change of many thousands stays below 2 eps.
ALLOWED_EPS = 2.0
# Long float32 sums differ between machines.
FLOAT32_NOISE = 2e-5
# The relative precision of dequantized weights: the error of NF4 is about 9 % of ||W||_F, of 8 bits below 1 %. The
# norms of two different models differ by more than the first value allows.
QUANTIZED_EPS = {torch.uint8: 0.25, torch.int8: 0.02}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Projections of a weight relative to its norm, the norm, the shape (out, in) and the relative rounding unit."""

    values: tuple[float, ...]
    norm: float
    shape: tuple[int, int]
    eps: float


def fingerprint(W: Tensor, shape: tuple[int, int] | None = None) -> Fingerprint:
    """Return the fingerprint of W (out, in), or of its first rows and columns, `shape` (padded vocabularies)."""
    eps = _precision(W)
    rows, columns = shape or (W.shape[0], W.shape[1])
    W = W[:rows, :columns].detach().float()
    norm = frobenius(W)
    left, right = _signs(rows, 0).to(W.device), _signs(columns, 1).to(W.device)
    with full_precision(W.device):
        values = ((W @ right) * left).sum(0, dtype=torch.float64)
    return Fingerprint(tuple(float(v) / norm if norm > 0 else 0.0 for v in values), norm, (rows, columns), eps)


def distance(saved: Fingerprint, W: Tensor, eps: float = 0.0) -> float:
    """Return the distance of W (out, in) from the weight of `saved`, as a multiple of the rounding error.

    A distance above 1 means another weight. `eps` is the relative precision of a dequantized W, which its dtype does
    not show.

    >>> W = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    >>> distance(fingerprint(W), W.bfloat16()) < 1 < distance(fingerprint(W), 1.1 * W)
    True
    """
    if W.shape[0] < saved.shape[0] or W.shape[1] < saved.shape[1]:
        return float("inf")
    here = fingerprint(W, saved.shape)
    here = replace(here, eps=max(here.eps, eps))
    allowed = FLOAT32_NOISE + ALLOWED_EPS * max(
        saved.eps if saved.eps > 1e-6 else 0.0, here.eps if here.eps > 1e-6 else 0.0
    )
    difference = max(abs(a - b) for a, b in zip(saved.values, here.values, strict=True))
    norm_difference = abs(saved.norm - here.norm) / max(saved.norm, here.norm, 1e-30)
    return max(difference, norm_difference) / allowed


def _precision(W: Tensor) -> float:
    """Return the rounding unit of the values. A half-precision checkpoint loaded in float32 is still coarse."""
    start = W[:64].detach()
    coarse = [t for t in (torch.bfloat16, torch.float16) if torch.equal(start.to(t).to(start.dtype), start)]
    return max(torch.finfo(dtype).eps for dtype in [W.dtype, *coarse])


@lru_cache(maxsize=64)
def _signs(length: int, side: int) -> Tensor:
    """Return signs (length, PROJECTIONS) that depend only on `length` and `side`.

    A generator of numpy or torch could give other numbers in another version or on another device.
    """
    index = torch.arange(length * PROJECTIONS, dtype=torch.int64) + (side + 1) * 0x9E3779B97F4A7C15 % 2**62
    mixed = (index ^ (index >> 30)) * 0x3F58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x14D049BB133111EB
    return (((mixed >> 31) & 1) * 2 - 1).float().reshape(length, PROJECTIONS)
