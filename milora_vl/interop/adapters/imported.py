"""Convert loaded adapters of other code to ours: module paths, residual bases, milora.json, fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from milora_vl.common.errors import UserError
from milora_vl.core.adapter.sidecar import Sidecar
from milora_vl.core.policy.rules import RuleMethod, Target
from milora_vl.core.policy.towers import canonical_names, find_towers
from milora_vl.core.weights.matrices import as_matrix, distance, fingerprint, matrix_shape, read_matrix
from milora_vl.interop.adapters.llava import in_hf_layout, read_llava
from milora_vl.interop.adapters.plain import PlainAdapter, read_plain, whole_modules
from milora_vl.interop.adapters.residual import read_residual, refuse_mutating
from milora_vl.interop.adapters.source import Source


def import_adapter(source: Source, base: nn.Module, base_name: str) -> tuple[PlainAdapter, Mapping[str, float]]:
    """Read a folder of any kind as an adapter of `base`, with a sidecar, and the drift of each module.

    The drift is the distance of residual + initial factors from the base. Raises UserError if they do not fit.
    """
    drift: Mapping[str, float] = {}
    methods: Mapping[str, RuleMethod] = {}
    if source.kind == "llava":
        adapter = in_hf_layout(read_llava(source.folder), canonical_names(base))
    elif source.kind == "residual":
        adapter, drift, methods = read_residual(source.folder, source.residual, source.initial, base)
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
    """Return the sidecar of an adapter with fingerprints of `base`; the default method is `lora`."""
    towers, names = find_towers(base), canonical_names(base)
    targets, fingerprints = [], {}
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
        fingerprints[path] = fingerprint(read_matrix(module))
    targets += whole_targets(adapter.whole, base)
    return Sidecar(targets, {t.path: names[t.path] for t in targets}, fingerprints, {})


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
        if distance(fingerprint(as_matrix(module, copy)), read_matrix(module)) > 1:
            raise UserError(
                "the saved weight differs from the base model, for example because tokens were added",
                code="adapter-other-embeddings",
                where=path,
                hint="use --to merged with the base that was trained:  --base FOLDER",
            )
