"""What an adapter or a full fine-tuning changes, module by module, whatever form it is saved in."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.utils import load_peft_weights
from torch import Tensor

from milora_data.errors import UserError
from milora_vl.adapters.imported import import_adapter, refuse_mutating
from milora_vl.adapters.llava import in_hf_layout, read_llava
from milora_vl.adapters.plain import PREFIX, LowRank, PlainAdapter, from_state, more_than_factors, read_config
from milora_vl.adapters.source import INITIAL_NAMES, find_source
from milora_vl.analyze.measures import Update, moved
from milora_vl.analyze.weights import Weights
from milora_vl.lora.sidecar import Sidecar, locate, read_sidecar
from milora_vl.models.loading import load_weights
from milora_vl.towers import canonical_names
from milora_vl.weights.fingerprint import distance

_MAGNITUDE = ".lora_magnitude_vector"
_TOKENS = "trainable_token_indices"


@dataclass(frozen=True, slots=True)
class Change:
    """One changed module. `rank` is the r of its method (half of what an anchored pair has), None for a whole weight.

    `low` are its factors, `magnitude` DoRA's column norms (out,), `whole` where the tuned weight is to be had from.
    """

    path: str
    method: str
    rank: int | None = None
    low: LowRank | None = None
    magnitude: Tensor | None = None
    whole: Tensor | Weights | None = None

    def update(self, W: Tensor, base: Weights, rank: int) -> tuple[Update, float, Tensor]:
        """The change of W (out, in): its first triplets (`rank` of them, or all), its norm, and the tuned weight."""
        if self.low is not None:
            A, B = (t.to(W.device) for t in self.low.matrices())
            if self.magnitude is None:
                found = Update.from_factors(B, A)
                return found, float(torch.linalg.vector_norm(found.S)), W.float() + B @ A
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
        """How far A and B left their start, relative to it; of a LoRA that starts at B = 0 the norms of the two."""
        if self.low is None or self.rank is None:
            return {}
        A, B = self.low.matrices()
        if self.low.rank == 2 * self.rank:  # [A; A0], [B, -B0]
            A, A0 = A.chunk(2, dim=0)
            B, B0 = B.chunk(2, dim=1)
            return {"moved_A": moved(A, A0), "moved_B": moved(B, -B0)}
        norms = (float(torch.linalg.matrix_norm(t.double())) for t in (A, B))
        return dict(zip(("norm_A", "norm_B"), norms, strict=True))


def read_changes(folder: Path, base: Weights, *, allow_base_mismatch: bool = False) -> dict[str, Change]:
    """Read an adapter folder of any origin: ours, PEFT's (DoRA too), LLaVA's, PiSSA's on a residual base.

    Raises UserError where it does not fit the base, or is of a kind that no matrix is known for.
    """
    source = find_source(folder)
    magnitudes: Mapping[str, Tensor] = {}
    names = canonical_names(base.model)
    if source.kind == "residual":
        base = base if base.stored is None else Weights.of(_loaded(base.name), base.name)
        adapter = import_adapter(source, base.model, base.name).adapter
    elif source.kind == "llava":
        adapter = in_hf_layout(read_llava(source.folder), names)
    else:
        if source.kind == "plain":
            _refuse_mutating(source.folder)
        adapter, magnitudes = _read(source.folder)
    if adapter.sidecar is not None and source.kind != "llava":
        adapter = _at_home(adapter, names)
        if not allow_base_mismatch and adapter.sidecar is not None:
            _require_base(adapter.sidecar, base)
    changes = dict(_factors(adapter, magnitudes))
    for key, tensor in adapter.whole.items():
        path, _, leaf = key.rpartition(".")
        if leaf == "weight" and base.has(path):
            changes[path] = Change(path, "full", whole=tensor)
    missing = [path for path in changes if not base.has(path)]
    if missing:
        raise UserError(
            f"the adapter changes {len(missing):,} modules that {base.name} does not have, first {missing[0]}\n"
            "is it the right base?  --base NAME-OR-FOLDER"
        )
    order = {path: place for place, (path, _) in enumerate(base.model.named_modules())}
    return dict(sorted(changes.items(), key=lambda item: order[item[0]]))


def changes_of_model(tuned: Weights, base: Weights) -> dict[str, Change]:
    """Every matrix of a fully tuned model that differs from the base's. UserError for models of other shapes."""
    paths = [path for path in base.paths() if tuned.has(path)]
    wrong = [path for path in paths if tuned.shape(path) != base.shape(path)]
    if wrong or not paths:
        raise UserError(f"{tuned.name} is no fine-tuned {base.name}: {wrong[0] if wrong else 'no layer'} differs")
    return {
        path: Change(path, "full", whole=tuned)
        for path in paths
        if not torch.equal(tuned.matrix(path).float(), base.matrix(path).float())
    }


def _refuse_mutating(folder: Path) -> None:
    """UserError with what can be done about it here: this command has no flags for the initial factors."""
    try:
        refuse_mutating(folder)
    except UserError:
        raise UserError(
            f"{folder} was trained on a residual base, and its initial factors are not here\n"
            f"put them into:  {folder}/{INITIAL_NAMES[0]}\n"
            f"or first:       python -m milora_vl.export {folder} --to adapter --initial FOLDER --output_dir O"
        ) from None


def _loaded(name: str) -> Any:

    return load_weights(name)


def _read(folder: Path) -> tuple[PlainAdapter, dict[str, Tensor]]:
    """A LoRA folder, and the magnitudes of a DoRA by path."""
    config = read_config(folder, any_lora=True)
    more = more_than_factors(folder)
    unknown = [what for name, what in more.items() if name not in ("use_dora", _TOKENS)]
    if unknown:
        raise UserError(f"{folder} holds {unknown[0]}: what it changes is no matrix that is known here")
    state = load_peft_weights(str(folder), device="cpu")
    found = {key: tensor for key, tensor in state.items() if _MAGNITUDE in key}
    apart = {key for key in state if ".trainable_tokens_" in key or (config.bias != "none" and key.endswith(".bias"))}
    if apart or _TOKENS in more:
        words = more.get(_TOKENS, "biases that were trained along")
        sys.stderr.write(f"not analysed, as they are no matrices: {words} ({len(apart)})\n")
    plain = {key: tensor for key, tensor in state.items() if key not in found and key not in apart}
    magnitudes = {key.removeprefix(PREFIX).partition(_MAGNITUDE)[0]: tensor for key, tensor in found.items()}
    return from_state(plain, config, folder, read_sidecar(folder)), magnitudes


def _at_home(adapter: PlainAdapter, names: Mapping[str, str]) -> PlainAdapter:
    """The adapter with the paths of this base, where it was saved from another layout of the same model."""
    saved = adapter.sidecar
    assert saved is not None
    here = locate(saved, names)
    moved_to = {old.path: new.path for old, new in zip(saved.targets, here.targets, strict=True)}
    factors = {moved_to.get(path, path): low for path, low in adapter.factors.items()}
    whole = {}
    for key, tensor in adapter.whole.items():
        path, _, leaf = key.rpartition(".")
        whole[f"{moved_to.get(path, path)}.{leaf}"] = tensor
    return replace(adapter, factors=factors, whole=whole, sidecar=here)


def _require_base(sidecar: Sidecar, base: Weights) -> None:
    for path, saved in sidecar.sketches.items():
        apart = distance(saved, base.matrix(path))
        if apart > 1:
            raise UserError(
                f"{base.name} is not the base model that the adapter was made for: {path} differs\n"
                f"({apart:.0f} times what rounding explains)\n"
                "say which it is:  --base NAME-OR-FOLDER   (or --allow_base_mismatch)"
            )


def _factors(adapter: PlainAdapter, magnitudes: Mapping[str, Tensor]) -> list[tuple[str, Change]]:
    saved = {target.path: target for target in adapter.sidecar.targets} if adapter.sidecar else {}
    found = []
    for path, low in adapter.factors.items():
        target, magnitude = saved.get(path), magnitudes.get(path)
        method = target.method if target else "dora" if magnitude is not None else "lora"
        rank = target.rank if target and target.rank else low.rank
        found.append((path, Change(path, method, rank, low, magnitude)))
    return found
