"""Convert loaded adapters of other code to ours: module paths, residual bases, milora.json, fingerprint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from milora_vl.common.errors import Problem, UserError
from milora_vl.core.adapter.folders import CONFIG
from milora_vl.core.adapter.layers import join
from milora_vl.core.adapter.sidecar import Sidecar
from milora_vl.core.policy.rules import RuleMethod, Target
from milora_vl.core.policy.towers import canonical_names, find_towers
from milora_vl.core.svd import decompose
from milora_vl.core.weights.fingerprint import distance, sketch
from milora_vl.core.weights.matrices import as_matrix, is_adaptable, matrix_shape, read_matrix
from milora_vl.interop.adapters.llava import in_hf_layout, read_llava
from milora_vl.interop.adapters.plain import LowRank, PlainAdapter, read_plain, whole_modules
from milora_vl.interop.adapters.source import Source
from milora_vl.models.loading import load_weights

# Largest relative distance between the base and residual + initial factors; above it the base is another model.
_LARGEST_DRIFT = 0.05


def import_adapter(source: Source, base: nn.Module, base_name: str) -> tuple[PlainAdapter, Mapping[str, float]]:
    """Read a folder of any kind as an adapter of `base`, with a sidecar, and the drift of each module.

    The drift is the distance of residual + initial factors from the base. Raises UserError if they do not fit.
    """
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
        adapter = replace(adapter, sidecar=sidecar_of(adapter, base, methods))
    elif source.kind == "llava":  # trained by milora_vl in LLaVA's code, which stores the projector separately
        adapter = replace(adapter, sidecar=_with_whole(adapter.sidecar, adapter.whole, base))
    return replace(adapter, base=base_name), drift


def sidecar_of(adapter: PlainAdapter, base: nn.Module, methods: Mapping[str, RuleMethod]) -> Sidecar:
    """Return the sidecar of an adapter with sketches of `base`; the default method is `lora`."""
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
    """Return the targets of milora.json for modules trained in full."""
    towers = find_towers(base)
    shapes = {path: tuple(next(base.get_submodule(path).parameters()).shape) for path in whole_modules(whole)}
    return [Target(path=p, shape=shape, tower=towers.tower_of(p), method="full") for p, shape in shapes.items()]


def _without_residual(source: Source, base: nn.Module) -> tuple[PlainAdapter, dict[str, float], dict[str, RuleMethod]]:
    """Return the rank-2r adapter [D; A0], [B0 + E, E] of the unchanged base, with drift and method per module."""
    trained = read_plain(source.folder)
    initial = read_plain(source.initial) if source.initial is not None else None
    residual = _residual_weights(source.residual)
    factors, anchors, drift, methods = {}, {}, {}, {}
    for path, low in trained.factors.items():
        W = read_matrix(base.get_submodule(path)).float()
        W_res = residual.get(path)
        if initial is not None and path not in initial.factors:
            factors[path] = low  # its base weight is unchanged
            continue
        if initial is not None:
            first = initial.factors[path]
        elif W_res is not None:
            first = _factors_of(W - W_res, low)
        else:
            raise UserError(problems=[_no_initial(source.folder)])
        A0, B0 = first.matrices()
        if W_res is not None:
            drift[path] = _relative(W_res + B0 @ A0 - W, W)
            if drift[path] > _LARGEST_DRIFT:
                raise UserError(
                    f"the residual belongs to another base model: the weight differs by {100 * drift[path]:.0f} % of "
                    "its norm",
                    code="adapter-wrong-base",
                    where=path,
                    hint="load the right one:  --base NAME-OR-FOLDER",
                )
        A, B = low.A.float().flatten(1), low.B.float().flatten(1)
        anchors[path] = B0 / low.scaling
        factors[path] = low.replaced(join(A - A0, A0, 0), join(B - anchors[path], anchors[path], 1), low.scaling)
        methods[path] = _method(B0, A0, W)
    return replace(trained, factors=factors, anchors=anchors), drift, methods


def _residual_weights(folder: Path | None) -> dict[str, Tensor]:
    """Return the matrices of the residual base by module path; empty without a residual base."""
    if folder is None:
        return {}
    model = load_weights(folder)
    return {name: read_matrix(m).float() for name, m in model.named_modules() if is_adaptable(m)}


def _factors_of(difference: Tensor, like: LowRank) -> LowRank:
    """Return the initial factors from base - residual, which has their rank up to rounding."""
    triplets = decompose(difference, like.rank, "principal")
    root = triplets.S.sqrt()
    return like.replaced(root[:, None] * triplets.Vh, triplets.U * root, 1.0)


def _method(B0: Tensor, A0: Tensor, W: Tensor) -> RuleMethod:
    """Return pissa if the initial factors hold more than the mean square of all singular values, else milora."""
    mean_square = float(W.square().sum()) / min(W.shape)
    energy = float((B0.T @ B0 * (A0 @ A0.T)).sum()) / A0.shape[0]  # ||B0 A0||_F^2 / r
    return "pissa" if energy > mean_square else "milora"


def _relative(difference: Tensor, W: Tensor) -> float:
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(W).clamp(min=1e-30))


def _require_modules(adapter: PlainAdapter, base: nn.Module) -> None:
    modules = dict(base.named_modules())
    wanted = [*adapter.factors, *(name.rpartition(".")[0] for name in adapter.whole)]
    missing = [path for path in dict.fromkeys(wanted) if path not in modules]
    if missing:
        raise UserError(
            f"the base model does not have {len(missing):,} modules of the adapter, first {missing[0]}",
            code="adapter-missing-modules",
            hint="load the right base:  --base NAME-OR-FOLDER",
        )


def require_copies(adapter: PlainAdapter, base: nn.Module) -> None:
    """Raise UserError if saved embeddings differ from the base (new tokens, for example): an export would lose them."""
    for path, copy in adapter.copies.items():
        module = base.get_submodule(path)
        if distance(sketch(as_matrix(module, copy)), read_matrix(module)) > 1:
            raise UserError(
                "the saved weight differs from the base model, for example because tokens were added",
                code="adapter-other-embeddings",
                where=path,
                hint="use --to merged with the base that was trained:  --base FOLDER",
            )


def refuse_mutating(folder: Path) -> None:
    """Raise UserError for an adapter with an SVD initialization of PEFT, saved without conversion.

    These initializations change the base, so the adapter does not fit the unchanged base without its initial factors.
    """
    start = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("init_lora_weights")
    if isinstance(start, str) and start.split("_")[0] in ("pissa", "olora", "corda", "lora", "loftq"):
        raise UserError(problems=[_no_initial(folder, f", with init_lora_weights {json.dumps(start)}")])


def _no_initial(folder: Path, detail: str = "") -> Problem:
    return Problem(
        f"the adapter was trained on a residual base{detail}, and its initial factors are missing",
        "adapter-no-initial-factors",
        str(folder),
        "convert it:  python -m milora_vl.export FOLDER --to adapter\n"
        "with         --initial FOLDER   (PEFT and LLaMA-Factory write pissa_init)\n"
        "or with      --residual FOLDER --base ORIGINAL",
    )
