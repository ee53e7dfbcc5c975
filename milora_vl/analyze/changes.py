"""Read what an adapter or a full fine-tuning changes in each module, from any saved form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft.utils import load_peft_weights
from torch import Tensor

from milora_vl.analyze.measures import Update, moved
from milora_vl.analyze.weights import Weights
from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import moved as moved_name
from milora_vl.core.adapter.sidecar import Sidecar, locate, new_paths, read_sidecar
from milora_vl.core.policy.towers import canonical_names
from milora_vl.core.weights.matrices import distance
from milora_vl.interop.imported import kind_of, require_unchanged_base
from milora_vl.interop.llava_layout import in_hf_layout, read_llava
from milora_vl.interop.lora_folder import PREFIX, LowRank, PlainAdapter, from_state, more_than_factors, read_config

_MAGNITUDE = ".lora_magnitude_vector"


@dataclass(frozen=True, slots=True)
class Change:
    """One changed module. `rank` is the r of its method (half the rank of anchored factors), None for a full weight.

    `low` holds its factors, `magnitude` DoRA's norms (out,), `whole` the tuned weight or the model that contains it.
    """

    path: str
    method: str
    rank: int | None = None
    low: LowRank | None = None
    magnitude: Tensor | None = None
    whole: Tensor | Weights | None = None

    def update(self, W: Tensor, base: Weights, rank: int) -> tuple[Update, float, Tensor]:
        """Return the change of W (out, in) as its first triplets (`rank` or all), its norm, and the tuned weight."""
        if self.low is not None:
            A, B = (t.to(W.device) for t in self.low.matrices())
            if self.magnitude is None:
                update = Update.from_factors(B, A)
                return update, float(torch.linalg.vector_norm(update.S)), W.float() + B @ A
            adapted = W.float() + B @ A
            norms = torch.linalg.vector_norm(adapted, dim=1)
            tuned = (self.magnitude.to(W.device).float().flatten() / norms)[:, None] * adapted
        elif isinstance(self.whole, Weights):
            tuned = self.whole.matrix(self.path).to(W.device).float()
        else:
            assert self.whole is not None
            tuned = base.as_stored(self.path, self.whole).to(W.device).float()
        change = tuned - W.float()
        return Update.from_matrix(change, rank), float(torch.linalg.matrix_norm(change.double())), tuned

    def moves(self) -> dict[str, float | None]:
        """Return the relative distance of A and B from their start, or their norms if B started at 0 (LoRA)."""
        if self.low is None or self.rank is None:
            return {}
        A, B = self.low.matrices()
        if self.low.rank == 2 * self.rank:  # [D; A0], [B0 + E, E]
            D, A0 = A.chunk(2, dim=0)
            B, E = B.chunk(2, dim=1)
            return {"moved_A": moved(D, A0), "moved_B": moved(E, B - E)}
        norms = (float(torch.linalg.matrix_norm(t.double())) for t in (A, B))
        return dict(zip(("norm_A", "norm_B"), norms, strict=True))


def read_changes(folder: Path, base: Weights, *, allow_base_mismatch: bool = False) -> dict[str, Change]:
    """Read an adapter folder of any origin: ours, PEFT (also DoRA), or LLaVA.

    Raises UserError if the adapter does not fit the base model, or if its change is not a known matrix.
    """
    kind = kind_of(folder)
    magnitudes: Mapping[str, Tensor] = {}
    names = canonical_names(base.model)
    if kind == "llava":
        adapter = in_hf_layout(read_llava(folder), names)
    else:
        if kind == "plain":
            require_unchanged_base(folder, base.name)
        adapter, magnitudes = _read(folder)
    if adapter.sidecar is not None and kind != "llava":
        saved, located = adapter.sidecar, locate(adapter.sidecar, names)
        path_of = new_paths(saved, located)
        adapter = replace(adapter.moved(lambda path: moved_name(path, path_of)), sidecar=located)
        if not allow_base_mismatch:
            _require_base(located, base)
    changes = dict(_factors(adapter, magnitudes))
    for key, tensor in adapter.whole.items():
        path, _, leaf = key.rpartition(".")
        if leaf == "weight" and base.has(path):
            changes[path] = Change(path, "full", whole=tensor)
    missing = [path for path in changes if not base.has(path)]
    if missing:
        raise UserError(
            f"the adapter changes {len(missing):,} modules that {base.name} does not have, first {missing[0]}",
            code="adapter-wrong-base",
            where="--base",
            hint="name the base model of the adapter:  --base NAME-OR-FOLDER",
        )
    order = {path: position for position, (path, _) in enumerate(base.model.named_modules())}
    return dict(sorted(changes.items(), key=lambda item: order[item[0]]))


def changes_of_model(tuned: Weights, base: Weights) -> dict[str, Change]:
    """Return every matrix of a fully tuned model that differs from the base model.

    Raises UserError if the shapes differ or the models share no layer.
    """
    paths = [path for path in base.paths() if tuned.has(path)]
    wrong = [path for path in paths if tuned.shape(path) != base.shape(path)]
    if wrong or not paths:
        reason = f"{wrong[0]} has another shape" if wrong else "they have no layer in common"
        raise UserError(
            f"{tuned.name} is not a fine-tuned {base.name}: {reason}",
            code="model-wrong-base",
            where="--base",
            hint="name the base model of the training:  --base NAME-OR-FOLDER",
        )
    return {
        path: Change(path, "full", whole=tuned)
        for path in paths
        if not torch.equal(tuned.matrix(path).float(), base.matrix(path).float())
    }


def _read(folder: Path) -> tuple[PlainAdapter, dict[str, Tensor]]:
    """Read a LoRA folder, and the magnitudes of a DoRA by path."""
    config = read_config(folder, any_lora=True)
    more = more_than_factors(folder)
    unknown = [description for name, description in more.items() if name != "use_dora"]
    if unknown:
        raise UserError(
            f"contains {unknown[0]}, which cannot be analysed as a change of a matrix",
            code="adapter-unsupported-kind",
            where=str(folder),
            hint="merge the adapter with PEFT's merge_and_unload, and analyze the saved model with --base",
        )
    state = load_peft_weights(str(folder), device="cpu")
    scales = {key: tensor for key, tensor in state.items() if _MAGNITUDE in key}
    plain = {key: tensor for key, tensor in state.items() if key not in scales}
    magnitudes = {key.removeprefix(PREFIX).partition(_MAGNITUDE)[0]: tensor for key, tensor in scales.items()}
    return from_state(plain, config, folder, read_sidecar(folder)), magnitudes


def _require_base(sidecar: Sidecar, base: Weights) -> None:
    for path, saved in sidecar.fingerprints.items():
        ratio = distance(saved, base.matrix(path))
        if ratio > 1:
            raise UserError(
                f"{base.name} is not the base model of the adapter: the difference in {path} is "
                f"{ratio:.0f} times the rounding error",
                code="adapter-wrong-base",
                where="--base",
                hint="name the right one:  --base NAME-OR-FOLDER   (or --allow_base_mismatch)",
            )


def _factors(adapter: PlainAdapter, magnitudes: Mapping[str, Tensor]) -> list[tuple[str, Change]]:
    saved = {target.path: target for target in adapter.sidecar.targets} if adapter.sidecar else {}
    changes = []
    for path, low in adapter.factors.items():
        target, magnitude = saved.get(path), magnitudes.get(path)
        method = target.method if target else "dora" if magnitude is not None else "lora"
        rank = target.rank if target and target.rank else low.rank
        changes.append((path, Change(path, method, rank, low, magnitude)))
    return changes
