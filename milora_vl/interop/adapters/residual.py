"""Read adapters of the papers' scripts: a residual base W - s B0 A0, and (A, B) of rank r that trained on it.

PEFT, LLaMA-Factory, ms-swift and the official MiLoRA write such folders. They become adapters of the unchanged base.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from milora_vl.common.errors import Problem, UserError
from milora_vl.core.adapter.anchored import join
from milora_vl.core.adapter.folders import CONFIG, adapters_inside, has_config
from milora_vl.core.policy.rules import RuleMethod
from milora_vl.core.svd import decompose
from milora_vl.core.weights.matrices import is_adaptable, read_matrix
from milora_vl.interop.adapters.plain import LowRank, PlainAdapter, read_plain
from milora_vl.models.loading import load_weights

# Subfolders with initial factors: PEFT and LLaMA-Factory, ms-swift, the official MiLoRA.
INITIAL_NAMES = ("pissa_init", "milora_init", "initial_model")
# The official MiLoRA script writes the initial adapter here, trains it, and writes the result to output_dir.
OFFICIAL_NAME = "lora"
# Largest relative distance between the base and residual + initial factors; above it the base is another model.
_LARGEST_DRIFT = 0.05


def read_residual(
    folder: Path, residual: Path | None, initial: Path | None, base: nn.Module
) -> tuple[PlainAdapter, dict[str, float], dict[str, RuleMethod]]:
    """Return the rank-2r adapter [D; A0], [B0 + E, E] of the unchanged base, with drift and method per module.

    `residual` and `initial` are the folders of the residual base and of the initial factors; one of them is enough.
    The drift is the distance of residual + initial factors from the base. Raises UserError if they do not fit.
    """
    trained = read_plain(folder)
    start = read_plain(initial) if initial is not None else None
    weights = _residual_weights(residual)
    factors, anchors, drift, methods = {}, {}, {}, {}
    for path, low in trained.factors.items():
        W = read_matrix(base.get_submodule(path)).float()
        W_res = weights.get(path)
        if start is not None and path not in start.factors:
            factors[path] = low  # its base weight is unchanged
            continue
        if start is not None:
            first = start.factors[path]
        elif W_res is not None:
            first = _factors_of(W - W_res, low)
        else:
            raise UserError(problems=[_no_initial(folder)])
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


def _holds_model(folder: Path) -> bool:
    has_weights = any(folder.glob("model.safetensors*")) or any(folder.glob("pytorch_model.bin*"))
    return has_weights and (folder / "config.json").is_file()


def trained_inside(folder: Path) -> Path | None:
    """Return the trained adapter: the folder, or the subfolder of a folder with a residual base."""
    if has_config(folder):
        return folder
    if not _holds_model(folder):
        return None
    subfolders = adapters_inside(folder)
    others = [path for path in subfolders if path.name not in INITIAL_NAMES]
    return next(iter(others or subfolders), None)


def residual_of(folder: Path) -> Path | None:
    """Return the residual base: the folder, or the base that its adapter names if it contains an initial adapter."""
    if _holds_model(folder) and not has_config(folder) and trained_inside(folder) is not None:
        return folder
    if not has_config(folder):
        return None
    named = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    base = Path(named) if named and isinstance(named, str) else None
    if base is None or not base.is_dir() or not _holds_model(base):
        return None
    return base if initial_of([base], None) is not None else None


def initial_of(folders: list[Path], trained: Path | None) -> Path | None:
    """Return the initial adapter in one of the folders; `lora` counts only beside a model (official MiLoRA)."""
    for folder in folders:
        names = [*INITIAL_NAMES, OFFICIAL_NAME] if _holds_model(folder) else INITIAL_NAMES
        for name in names:
            if has_config(folder / name) and (name != OFFICIAL_NAME or folder / name != trained):
                return folder / name
    # A residual base with one untrained adapter: its factors are the initial ones.
    if trained is not None and trained.name == OFFICIAL_NAME and _holds_model(trained.parent):
        return trained
    return None
