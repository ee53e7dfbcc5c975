"""Read an adapter folder of any origin (ours, PEFT's, LLaVA's) as an adapter of the unchanged base model.

The papers' scripts change the base too: PiSSA and MiLoRA train factors (A, B) that start at (A0, B0) on the residual
base W - s B0 A0. Such an adapter is refused on the unchanged base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import CONFIG, has_config, holds_llava_adapter, no_adapter_in, not_a_folder
from milora_vl.core.adapter.load import require_adapter_files
from milora_vl.core.adapter.sidecar import FILE_NAME, Sidecar
from milora_vl.core.policy.rules import Target
from milora_vl.core.policy.towers import canonical_names, find_towers
from milora_vl.core.weights.matrices import as_matrix, distance, fingerprint, matrix_shape, read_matrix
from milora_vl.interop.llava_layout import in_hf_layout, read_llava
from milora_vl.interop.lora_folder import PlainAdapter, read_plain, whole_modules

AdapterKind = Literal["ours", "plain", "llava"]
# Where PEFT, LLaMA-Factory, ms-swift and the official MiLoRA put the initial factors, beside the residual base.
INITIAL_NAMES = ("pissa_init", "milora_init", "initial_model", "lora")
# Initializations of PEFT that change the base weight too.
_MUTATING = ("pissa", "olora", "corda", "lora", "loftq")


def kind_of(folder: Path) -> AdapterKind:
    """Return who wrote the adapter in `folder`, by its files."""
    problem = not_a_folder(folder)
    if problem is None and not has_config(folder):
        problem = no_adapter_in(folder, "", "milora_vl.export", "--to", "FORM")
    if problem is not None:
        raise UserError(problems=[problem])
    require_adapter_files(folder)
    if holds_llava_adapter(folder):
        return "llava"
    return "ours" if (folder / FILE_NAME).is_file() else "plain"


def import_adapter(folder: Path, base: nn.Module, base_name: str) -> PlainAdapter:
    """Read a folder of any kind as an adapter of `base`, with a sidecar.

    Raises UserError for modules that the base does not have, and for an adapter on a residual base.
    """
    if holds_llava_adapter(folder):
        adapter = in_hf_layout(read_llava(folder), canonical_names(base))
    else:
        require_unchanged_base(folder, base_name)
        adapter = read_plain(folder)
    _require_modules(adapter, base)
    require_copies(adapter, base)
    if adapter.sidecar is None:
        adapter = replace(adapter, sidecar=_sidecar_of(adapter, base))
    elif holds_llava_adapter(folder):  # trained by milora_vl in LLaVA's code, which stores the projector separately
        adapter = replace(adapter, sidecar=_with_whole(adapter.sidecar, adapter.whole, base))
    return replace(adapter, base=base_name)


def require_unchanged_base(folder: Path, base: str) -> None:
    """Raise UserError for an adapter that was trained on a residual base, unless `base` is that one.

    It loads on the original base without an error, and its results there are wrong.
    """
    start, residual = _config(folder).get("init_lora_weights"), names_residual_base(folder)
    is_mutating = isinstance(start, str) and start.split("_")[0] in _MUTATING
    if (is_mutating and residual is None) or (residual is not None and Path(base).resolve() != residual.resolve()):
        raise UserError(
            "the adapter was trained on a residual base, and is wrong on the original one",
            where=str(folder),
            hint="merge it:  python -m milora_vl.export FOLDER --to merged --base RESIDUAL\n"
            "or convert it there: PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


def names_residual_base(folder: Path) -> Path | None:
    """Return the base that an adapter names if it is a residual base: a folder with initial factors inside."""
    named = Path(str(_config(folder).get("base_model_name_or_path")))
    inside = [named / name for name in INITIAL_NAMES]
    return named if any(has_config(path) and path.resolve() != folder.resolve() for path in inside) else None


def _config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return content


def _sidecar_of(adapter: PlainAdapter, base: nn.Module) -> Sidecar:
    towers, names = find_towers(base), canonical_names(base)
    targets, fingerprints = [], {}
    for path, low in adapter.factors.items():
        module = base.get_submodule(path)
        targets.append(
            Target(
                path=path,
                shape=matrix_shape(module),
                tower=towers.tower_of(path),
                method="lora",
                rank=low.rank,
                alpha=low.scaling * low.rank,
                dropout=adapter.dropout,
            )
        )
        fingerprints[path] = fingerprint(read_matrix(module))
    targets += _whole_targets(adapter.whole, base)
    return Sidecar(targets, {t.path: names[t.path] for t in targets}, fingerprints, {})


def _with_whole(sidecar: Sidecar, whole: Mapping[str, Tensor], base: nn.Module) -> Sidecar:
    known, names = {t.path for t in sidecar.targets}, canonical_names(base)
    added = [t for t in _whole_targets(whole, base) if t.path not in known]
    return replace(
        sidecar,
        targets=[*sidecar.targets, *added],
        names={**sidecar.names, **{t.path: names[t.path] for t in added}},
    )


def _whole_targets(whole: Mapping[str, Tensor], base: nn.Module) -> list[Target]:
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
            hint="load the right base:  --base NAME-OR-FOLDER",
        )


def require_copies(adapter: PlainAdapter, base: nn.Module) -> None:
    """Raise UserError if saved embeddings differ from the base (new tokens, for example): an export would lose them."""
    for path, copy in adapter.copies.items():
        module = base.get_submodule(path)
        if distance(fingerprint(as_matrix(module, copy)), read_matrix(module)) > 1:
            message = "the saved weight differs from the base model, for example because tokens were added"
            hint = "use --to merged with the base that was trained:  --base FOLDER"
            raise UserError(message, where=path, hint=hint)
