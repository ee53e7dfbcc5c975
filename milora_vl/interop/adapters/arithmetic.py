"""Scale an adapter (`export --scale`), and add several (`--weights`): exact, on the tensors of their folders.

An update scales by its alpha. Updates add by joined factors: s1 B1 A1 + s2 B2 A2 = s [s1/s B1, s2/s B2] [A1; A2].
A module trained in full from W to W' becomes W + w (W' - W).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor, nn

from milora_vl.common.errors import UserError
from milora_vl.interop.adapters.imported import sidecar_of
from milora_vl.interop.adapters.plain import LowRank, PlainAdapter, more_than_factors, read_config, whole_modules


def require_linear(folder: Path, flag: str) -> None:
    """Raise UserError for an adapter whose update is not a product of two factors, so that it has no scale."""
    more = list(more_than_factors(folder).values())
    if read_config(folder, any_lora=True).bias != "none":
        more.append("trained biases")
    if more:
        raise UserError(
            f"the folder holds {more[0]}: its update is not a product of two factors, and cannot be scaled or added",
            code="adapter-not-scalable",
            where=str(folder),
            hint=f"remove {flag}",
        )


def require_scale(scale: object) -> None:
    """Raise UserError unless the size of an update is a number from 0."""
    if not isinstance(scale, Real) or isinstance(scale, bool) or not 0 <= float(scale) < math.inf:
        raise UserError(f"must be a number from 0, got {scale!r}", code="flag-value", where="--scale")


def scaled(adapter: PlainAdapter, scale: float, base: nn.Module | None) -> PlainAdapter:
    """Return the adapter with its update times `scale`. `base` is the base model, needed for modules trained in full.

    The stored factors do not change; alpha does, in adapter_config.json and in milora.json.
    """
    factors = {path: replace(low, scaling=scale * low.scaling) for path, low in adapter.factors.items()}
    whole = _whole([adapter], [scale], base) if adapter.whole else {}
    sidecar = adapter.sidecar
    if sidecar is not None:
        targets = [t if t.alpha is None else replace(t, alpha=scale * t.alpha) for t in sidecar.targets]
        sidecar = replace(sidecar, targets=targets)
    return replace(adapter, factors=factors, whole=whole, sidecar=sidecar)


def combined(adapters: Sequence[PlainAdapter], weights: Sequence[float], base: nn.Module) -> PlainAdapter:
    """Return the weighted sum of the updates as one adapter of `base`; the rank of a module is the sum of its ranks.

    A new adapter has no initial factors: continued training trains it as a plain LoRA. Raises UserError if one adapter
    trained a module in full in which another has factors.
    """
    _require_one_kind(adapters)
    lows: dict[str, list[tuple[LowRank, float]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, low in adapter.factors.items():
            lows.setdefault(path, []).append((low, weight))
    first = adapters[0]
    joined = PlainAdapter(
        base=first.base,
        factors={path: _joined(parts) for path, parts in lows.items()},
        whole=_whole(adapters, weights, base),
        dropout=first.dropout,
        task_type=first.task_type,
    )
    return replace(joined, sidecar=sidecar_of(joined, base, {}))


def _joined(parts: Sequence[tuple[LowRank, float]]) -> LowRank:
    """Return the sum of weighted changes of one module, with the scaling of the first part of non-zero weight."""
    scaling = next((weight * low.scaling for low, weight in parts if weight), 1.0)
    dtype = reduce(torch.promote_types, (low.B.dtype for low, _ in parts))
    A = torch.cat([low.A.to(dtype) for low, _ in parts], dim=0)
    B = torch.cat([(low.B.double() * (weight * low.scaling / scaling)).to(dtype) for low, weight in parts], dim=1)
    return replace(parts[0][0], A=A, B=B, scaling=scaling)


def _whole(adapters: Sequence[PlainAdapter], weights: Sequence[float], base: nn.Module | None) -> dict[str, Tensor]:
    """Return W + sum of w (W' - W) for each weight that an adapter trained in full, in its stored dtype."""
    names = dict.fromkeys(name for adapter in adapters for name in adapter.whole)
    if not names:
        return {}
    assert base is not None
    before = base.state_dict()
    result = {}
    for name in names:
        trained = [
            (adapter.whole[name], w) for adapter, w in zip(adapters, weights, strict=True) if name in adapter.whole
        ]
        first = trained[0][0]
        if name not in before or before[name].shape != first.shape:
            found = "no such weight" if name not in before else f"shape {tuple(before[name].shape)}"
            raise UserError(
                f"trained in full with shape {tuple(first.shape)}, but the base model has {found}",
                code="adapter-wrong-base",
                where=name,
                hint="name the base model of the adapter:  --base NAME-OR-FOLDER",
            )
        result[name] = interpolated(before[name], trained)
    return result


def interpolated(W: Tensor, trained: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return W + sum of w (W' - W) for pairs (W', w), in the dtype of the first W'; counters keep its value."""
    first = trained[0][0]
    if not first.is_floating_point():
        return first.clone()
    start = W.to(first.device).double()
    change = sum(w * (after.double() - start) for after, w in trained)
    return (start + change).to(first.dtype)


def _require_one_kind(adapters: Sequence[PlainAdapter]) -> None:
    whole = whole_modules({name: tensor for adapter in adapters for name, tensor in adapter.whole.items()})
    factors = dict.fromkeys(path for adapter in adapters for path in adapter.factors)
    for path in factors:
        if any(path == module or path.startswith(f"{module}.") for module in whole):
            raise UserError(
                "one adapter trained this module in full, another has factors for it: their sum is neither",
                code="adapter-not-scalable",
                where=path,
                hint="merge one of them into the base:  --to merged, and use the result as --base of the other",
            )


def same_base(names: Mapping[Path, str]) -> str:
    """Return the one base model that all adapters name. Raises UserError if they name several."""
    different = dict.fromkeys(names.values())
    if len(different) > 1:
        listed = "\n".join(f"{folder}: {name}" for folder, name in names.items())
        raise UserError(
            "the adapters name different base models",
            code="adapter-wrong-base",
            where="--base",
            hint=f"{listed}\nif these are the same weights, add:  --base NAME-OR-FOLDER",
        )
    return next(iter(different))
