"""Adapters that others made, as adapters of ours: paths of the base model, milora.json with the base's fingerprint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from milora_data.errors import UserError
from milora_vl.adapters.llava import in_hf_layout, read_llava
from milora_vl.adapters.plain import LowRank, PlainAdapter, read_config, read_plain, whole_modules
from milora_vl.adapters.source import Source
from milora_vl.lora.sidecar import Sidecar
from milora_vl.models.loading import load_weights
from milora_vl.policy.rules import RuleMethod, Target
from milora_vl.svd import decompose
from milora_vl.towers import canonical_names, find_towers
from milora_vl.weights.fingerprint import distance, sketch
from milora_vl.weights.matrices import as_matrix, is_adaptable, matrix_shape, read_matrix

# A base further than this from residual + initial factors, relative to its norm, is another model.
_LARGEST_DRIFT = 0.05


@dataclass(frozen=True, slots=True)
class Imported:
    """An adapter for the untouched base. `drift`: per module, how far residual + initial factors are from the base."""

    adapter: PlainAdapter
    drift: Mapping[str, float]


def import_adapter(source: Source, base: nn.Module, base_name: str) -> Imported:
    """Read a folder of any kind as an adapter of `base`, with a sidecar. UserError where they do not fit."""
    drift: Mapping[str, float] = {}
    methods: Mapping[str, RuleMethod] = {}
    if source.kind == "llava":
        adapter = in_hf_layout(read_llava(source.folder), canonical_names(base))
    elif source.kind == "residual":
        adapter, drift, methods = _without_residual(source, base)
    else:
        refuse_mutating(source.folder)
        adapter = read_plain(source.folder)
    _require_modules(adapter, base)
    require_copies(adapter, base)
    if adapter.sidecar is None:
        adapter = replace(adapter, sidecar=describe(adapter, base, methods))
    elif source.kind == "llava":  # trained by us in LLaVA's code, which keeps the projector apart
        adapter = replace(adapter, sidecar=_with_whole(adapter.sidecar, adapter.whole, base))
    return Imported(replace(adapter, base=base_name), drift)


def describe(adapter: PlainAdapter, base: nn.Module, methods: Mapping[str, RuleMethod]) -> Sidecar:
    """Return what milora.json says of an adapter: `lora` where `methods` names no other; the sketches are of `base`."""
    towers, names = find_towers(base), canonical_names(base)
    targets, sketches = [], {}
    for path, low in adapter.factors.items():
        module = base.get_submodule(path)
        method = methods.get(path, "lora")
        rank = low.rank if method == "lora" else low.rank // 2
        targets.append(
            Target(
                path=path,
                shape=matrix_shape(module),
                tower=towers.tower_of(path),
                method=method,
                rank=rank,
                alpha=low.scaling * rank,
                dropout=adapter.dropout,
            )
        )
        sketches[path] = sketch(read_matrix(module))
    targets += whole_targets(adapter.whole, base)
    return Sidecar("anchored", targets, {t.path: names[t.path] for t in targets}, sketches, {})


def _with_whole(sidecar: Sidecar, whole: Mapping[str, Tensor], base: nn.Module) -> Sidecar:
    known, names = {t.path for t in sidecar.targets}, canonical_names(base)
    added = [t for t in whole_targets(whole, base) if t.path not in known]
    return replace(
        sidecar,
        targets=[*sidecar.targets, *added],
        names={**sidecar.names, **{t.path: names[t.path] for t in added}},
    )


def whole_targets(whole: Mapping[str, Tensor], base: nn.Module) -> list[Target]:
    """Return the modules trained in full, as milora.json lists them."""
    towers = find_towers(base)
    shapes = {path: tuple(next(base.get_submodule(path).parameters()).shape) for path in whole_modules(whole)}
    return [Target(path=p, shape=shape, tower=towers.tower_of(p), method="full") for p, shape in shapes.items()]


def _without_residual(source: Source, base: nn.Module) -> tuple[PlainAdapter, dict[str, float], dict[str, RuleMethod]]:
    """The rank-2r adapter [A; A0], [B, -B0] of the untouched base."""
    trained = read_plain(source.folder)
    initial = read_plain(source.initial) if source.initial is not None else None
    residual = _residual_weights(source.residual)
    factors, drift, methods = {}, {}, {}
    for path, low in trained.factors.items():
        W = read_matrix(base.get_submodule(path)).float()
        W_res = residual.get(path)
        if initial is not None and path not in initial.factors:
            factors[path] = low  # its base weight was left alone
            continue
        if initial is not None:
            first = initial.factors[path]
        elif W_res is not None:
            first = _factors_of(W - W_res, low)
        else:
            raise UserError(_no_initial(source.folder))
        A0, B0 = first.matrices()
        if W_res is not None:
            drift[path] = _relative(W_res + B0 @ A0 - W, W)
            if drift[path] > _LARGEST_DRIFT:
                raise UserError(
                    f"the base model is not the one that the residual was made of: {path} is off by "
                    f"{100 * drift[path]:.0f} % of its norm\nload the right one:  --base NAME-OR-FOLDER"
                )
        A, B = low.A.float().flatten(1), low.B.float().flatten(1)
        joined = torch.cat([A, A0]), torch.cat([B, -B0 / low.scaling], dim=1)
        factors[path] = low.replaced(*joined, low.scaling)
        methods[path] = _method(B0, A0, W)
    return replace(trained, factors=factors), drift, methods


def _residual_weights(folder: Path | None) -> dict[str, Tensor]:
    """The matrices of the residual base by module path; nothing where only the initial factors are known."""
    if folder is None:
        return {}
    model = load_weights(folder)
    return {name: read_matrix(m).float() for name, m in model.named_modules() if is_adaptable(m)}


def _factors_of(difference: Tensor, like: LowRank) -> LowRank:
    """The initial factors from base less residual, which has their rank but for rounding."""
    found = decompose(difference, like.rank, "principal")
    root = found.S.sqrt()
    return like.replaced(root[:, None] * found.Vh, found.U * root, 1.0)


def _method(B0: Tensor, A0: Tensor, W: Tensor) -> RuleMethod:
    """Principal components are larger than the root mean square of all singular values, minor ones smaller."""
    mean_square = float(W.square().sum()) / min(W.shape)
    held = float((B0.T @ B0 * (A0 @ A0.T)).sum()) / A0.shape[0]  # ||B0 A0||_F^2 / r
    return "pissa" if held > mean_square else "milora"


def _relative(difference: Tensor, W: Tensor) -> float:
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(W).clamp(min=1e-30))


def _require_modules(adapter: PlainAdapter, base: nn.Module) -> None:
    modules = dict(base.named_modules())
    wanted = [*adapter.factors, *(name.rpartition(".")[0] for name in adapter.whole)]
    missing = [path for path in dict.fromkeys(wanted) if path not in modules]
    if missing:
        raise UserError(
            f"the adapter changes {len(missing):,} modules that the base model does not have, first {missing[0]}\n"
            "is it the right base?  --base NAME-OR-FOLDER"
        )


def require_copies(adapter: PlainAdapter, base: nn.Module) -> None:
    """Raise UserError where embeddings saved along are not the base's: more tokens, which the export would lose."""
    for path, copy in adapter.copies.items():
        module = base.get_submodule(path)
        if distance(sketch(as_matrix(module, copy)), read_matrix(module)) > 1:
            raise UserError(
                f"{path} of the adapter is not that of the base model (have tokens been added?)\n"
                "possible:  --to merged, with the base that was trained:  --base FOLDER"
            )


def refuse_mutating(folder: Path) -> None:
    """Raise UserError for an adapter of PEFT's SVD starts, saved without conversion.

    They change the base: without their initial factors such a folder fits no untouched base.
    """
    start = read_config(folder, any_lora=True).init_lora_weights
    if isinstance(start, str) and start.split("_")[0] in ("pissa", "olora", "corda", "lora", "loftq"):
        raise UserError(f"{_no_initial(folder)}\n(its init_lora_weights is {json.dumps(start)})")


def _no_initial(folder: Path) -> str:
    return (
        f"{folder} was trained on a residual base, and its initial factors are not here\n"
        "say where they are:  --initial FOLDER   (PEFT and LLaMA-Factory write pissa_init)\n"
        "or give both bases:  --residual FOLDER --base ORIGINAL"
    )
