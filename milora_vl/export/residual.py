"""The form of the papers' scripts: a residual base W - s B0 A0 as a full model, and (A, B) of rank r next to it.

model.safetensors, config.json, ...   the residual base
lora/                                 the trained A and B, where the official MiLoRA script expects them
lora_init/                            A0 and B0, which restore the unchanged base model
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from milora_vl.common.errors import UserError
from milora_vl.core.adapter.layers import recover
from milora_vl.core.weights.matrices import as_matrix, factor_dtype
from milora_vl.export.base import save_model
from milora_vl.interop.adapters.plain import LowRank, PlainAdapter, write_plain
from milora_vl.interop.adapters.source import OFFICIAL_NAME

INITIAL = "lora_init"


def write_residual(
    adapter: PlainAdapter, base: nn.Module, folder: Path, name: str, dtype: torch.dtype | None = None
) -> Mapping[str, float]:
    """Subtract s B0 A0 from `base` (in place), write it and both adapters, and return the drift of every layer.

    The two adapters record `name` as their base model: the final folder of the export. The drift is the error of
    rounding the residual to its stored data type, relative to ||W||_F.
    Raises UserError if the adapter has no initial factors.
    """
    parts = {t.path: t for t in adapter.sidecar.targets if t.has_anchor} if adapter.sidecar is not None else {}
    if not parts:
        raise UserError(
            "the adapter has no initial factors to subtract: it was not trained with milora, pissa or random rules",
            code="export-needs-initial-factors",
            where="--to",
            hint="use another form: adapter, merged, llava, rank-r",
        )
    trained, initial = dict(adapter.factors), {}
    for path in parts:
        dtype_of_anchor = factor_dtype(base.get_submodule(path))
        trained[path], initial[path] = _halves(adapter.factors[path], adapter.anchors.get(path), dtype_of_anchor)
    if dtype is not None:  # subtract the same rounded factors that are written
        initial = {path: low.cast(dtype) for path, low in initial.items()}
    drift = {path: _subtract(base.get_submodule(path), low, dtype) for path, low in initial.items()}
    save_model(base if dtype is None else base.to(dtype), folder, dtype)
    for subfolder, factors, whole in ((OFFICIAL_NAME, trained, adapter.whole), (INITIAL, initial, {})):
        part = replace(adapter, base=name, factors=factors, whole=whole, sidecar=None)
        write_plain(part.cast(dtype), folder / subfolder)
    return drift


def _halves(low: LowRank, B0: Tensor | None, dtype: torch.dtype) -> tuple[LowRank, LowRank]:
    """Return (A, B) and (A0, B0) from the joined factors [D; A0], [B0 + E, E] and the exact B0, if it is stored."""
    (D, A0), (B, E) = low.A.chunk(2, dim=0), low.B.chunk(2, dim=1)
    B0 = recover(B, E, dtype) if B0 is None else B0.reshape(B.shape)
    return replace(low, A=A0 + D, B=B.clone()), replace(low, A=A0.clone(), B=B0.to(B.dtype))


@torch.no_grad()
def _subtract(module: nn.Module, initial: LowRank, dtype: torch.dtype | None) -> float:
    weight: Tensor = module.get_parameter("weight").data
    matrix = as_matrix(module, weight)  # a view: writing into it changes the module
    W = matrix.float().clone()
    A0, B0 = initial.matrices()
    matrix.copy_((W - B0 @ A0).to(dtype or matrix.dtype))
    difference = matrix.float() + B0 @ A0 - W
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(W).clamp(min=1e-30))
