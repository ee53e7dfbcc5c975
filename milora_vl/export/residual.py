"""The form of the papers' own scripts: a residual base W - s B0 A0 as a whole model, and (A, B) of rank r beside it.

model.safetensors, config.json, ...   the residual base
lora/                                 A and B as trained, where the official MiLoRA script looks for them
lora_init/                            A0 and B0: what brings the untouched base back
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from milora_data.errors import UserError
from milora_vl.adapters.plain import LowRank, PlainAdapter, write_plain
from milora_vl.adapters.source import OFFICIAL_NAME
from milora_vl.export.base import save_model
from milora_vl.weights.matrices import as_matrix

INITIAL = "lora_init"


def write_residual(
    adapter: PlainAdapter, base: nn.Module, folder: Path, name: str, dtype: torch.dtype | None = None
) -> Mapping[str, float]:
    """Take s B0 A0 out of `base` (in place), write it and both adapters; return the drift of every layer.

    `name` is what the two adapters call their base: the folder where all this will be.

    The drift is what rounding the residual to the dtype it is written in loses, relative to ||W||_F.
    UserError for an adapter without initial factors.
    """
    parts = {t.path: t for t in adapter.sidecar.targets if t.has_anchor} if adapter.sidecar is not None else {}
    if not parts:
        raise UserError(
            "this adapter has no initial factors (milora, pissa or random rules): nothing to take out of the base\n"
            "possible:  --to adapter, merged, llava, rank-r"
        )
    trained, initial = dict(adapter.factors), {}
    for path in parts:
        trained[path], initial[path] = _halves(adapter.factors[path])
    if dtype is not None:  # what is taken out is what is written beside
        initial = {path: low.cast(dtype) for path, low in initial.items()}
    drift = {path: _take_out(base.get_submodule(path), low, dtype) for path, low in initial.items()}
    save_model(base if dtype is None else base.to(dtype), folder, dtype)
    for subfolder, factors, whole in ((OFFICIAL_NAME, trained, adapter.whole), (INITIAL, initial, {})):
        part = replace(adapter, base=name, factors=factors, whole=whole, sidecar=None)
        write_plain(part.cast(dtype), folder / subfolder)
    return drift


def _halves(low: LowRank) -> tuple[LowRank, LowRank]:
    """(A, B) and (A0, B0) of the joined factors [A; A0], [B, -B0]."""
    (A, A0), (B, B0) = low.A.chunk(2, dim=0), low.B.chunk(2, dim=1)
    return replace(low, A=A.clone(), B=B.clone()), replace(low, A=A0.clone(), B=-B0)


@torch.no_grad()
def _take_out(module: nn.Module, initial: LowRank, dtype: torch.dtype | None) -> float:
    weight: Tensor = module.get_parameter("weight").data
    matrix = as_matrix(module, weight)  # a view: writing into it changes the module
    W = matrix.float().clone()
    A0, B0 = initial.matrices()
    matrix.copy_((W - B0 @ A0).to(dtype or matrix.dtype))
    difference = matrix.float() + B0 @ A0 - W
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(W).clamp(min=1e-30))
