"""Compute one row per layer: what a training changed in its weight, measured as in the paper (arXiv:2406.09044).

Throughout, W is the pretrained weight (out, in) and the update is fine-tuned minus pretrained. Adapters of any origin
are read as `load_model` reads them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from milora_vl.common.atomic_write import json_lines
from milora_vl.common.errors import UserError
from milora_vl.common.progress import progress_bar
from milora_vl.core.adapter.anchored import anchors_of, factors, has_anchor
from milora_vl.core.adapter.folders import base_of, holds_adapter, holds_projector_alone
from milora_vl.core.adapter.peft_model import MiloraMixin
from milora_vl.core.policy.towers import Towers, find_towers
from milora_vl.core.svd import Factors, decompose
from milora_vl.core.weights.matrices import is_adaptable, is_linear, read_matrix
from milora_vl.core.weights.tensor_files import weights_digest
from milora_vl.interop.load_model import load_any
from milora_vl.models.devices import device_named
from milora_vl.models.loading import load_weights
from milora_vl.models.projector import load_projector

LayerRow = dict[str, Any]


# Intruder dimensions (arXiv:2410.21228, algorithm 1): number of directions, and the cosine below which one is new.
INTRUDER_K, INTRUDER_EPSILON = 10, 0.5


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """A change of one weight as singular triplets: U (out, k), S (k,) descending, Vh (k, in)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    @classmethod
    def from_factors(cls, B: Tensor, A: Tensor) -> LowRankUpdate:
        """Return the change B A from B (out, k), A (k, in), by two thin QR decompositions without forming the matrix.

        Components below the rounding of the largest are removed, so a little trained LoRA may have fewer than k.
        """
        Q_B, R_B = torch.linalg.qr(B.double())
        Q_A, R_A = torch.linalg.qr(A.double().T)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
        return cls(Q_B @ U, S, Vh @ Q_A.T)._without_zeros()

    @classmethod
    def from_matrix(cls, change: Tensor, rank: int) -> LowRankUpdate:
        """Return the first `rank` triplets of a change given as a full matrix."""
        factors = decompose(change, min(rank, *change.shape), "principal")
        return cls(factors.U.double(), factors.S.double(), factors.Vh.double())._without_zeros()

    def first(self, rank: int) -> LowRankUpdate:
        """Return the first `rank` triplets, or all if there are fewer."""
        return LowRankUpdate(self.U[:, :rank], self.S[:rank], self.Vh[:rank])

    def _without_zeros(self) -> LowRankUpdate:
        kept = int(torch.count_nonzero(self.S / self.S[0] > 1e-7)) if float(self.S[0]) > 0 else 0
        return self.first(kept)


def amplification(W: Tensor, update: LowRankUpdate, rank: int) -> tuple[float, float]:
    """Return (||U' dW V||_F, ||U' W V||_F) with U, V the top-`rank` singular vectors of the update dW.

    Their ratio is the amplification factor (LoRA paper, section 7.3). It is large if the update is large or if W has
    little energy in its directions, so a lower factor alone does not show that more was preserved: read both numbers.
    """
    top = update.first(rank)
    inside = top.U.T @ (W.double() @ top.Vh.T)
    return float(torch.linalg.vector_norm(top.S)), float(torch.linalg.matrix_norm(inside))


def expected_inside(W_norm: float, shape: tuple[int, int], rank: int) -> float:
    """Return the root mean square of ||U'WV||_F over random orthonormal U (out, rank), V (in, rank).

    >>> round(expected_inside(97.36, (4096, 4096), 64), 2)  # the paper's q_proj: 1.50 for one draw
    1.52
    """
    return rank * W_norm / (shape[0] * shape[1]) ** 0.5


def similarities(base: Factors, update: LowRankUpdate, rank: int) -> tuple[float, float, float]:
    """Return the similarity of the update's left vectors with the top, the bottom and random left vectors of W.

    The similarity of column-orthonormal A, B (d, r) is ||A'B||_F^2 / r, in [0, 1]. `base` is the full decomposition of
    W. The third value is the mean over all choices of `rank` of its vectors.
    """
    vectors = update.first(rank).U
    r = vectors.shape[1]
    if r == 0:
        return 0.0, 0.0, 0.0
    shares = (base.U.double().T @ vectors).square().sum(1)  # one per left vector of W
    return float(shares[:r].sum()) / r, float(shares[-r:].sum()) / r, float(shares.mean())


def intruders(base: Factors, tuned_U: Tensor, epsilon: float = INTRUDER_EPSILON) -> int:
    """Return how many columns of `tuned_U` (out, k), the top left vectors of the tuned weight, are new.

    A vector is new if its cosine with every left singular vector of the pretrained weight is below `epsilon`
    (arXiv:2410.21228, algorithm 1, which uses k = 10 and epsilon = 0.5). `base` is the full decomposition of W.
    """
    cosines = (base.U.double().T @ tuned_U.double()).abs().max(dim=0).values
    return int((cosines < epsilon).sum())


def moved(change: Tensor, start: Tensor) -> float | None:
    """Return ||change||_F / ||start||_F; None if `start` is zero."""
    length = float(torch.linalg.vector_norm(start.double()))
    return float(torch.linalg.vector_norm(change.double())) / length if length else None


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a base model, and what a training made of it: a LoRA layer, or a layer trained in full.

    `rank` is the r of its method (half the rank of anchored factors).
    """

    path: str
    towers: Towers
    before: nn.Module
    after: nn.Module
    method: str = "full"
    rank: int | None = None

    def row(self, device: torch.device, rank: int) -> LayerRow:
        towers, W = self.towers, read_matrix(self.before).to(device).float()
        block, tower = towers.block_of(self.path), towers.tower_of(self.path) or "other"
        names = {
            "path": self.path, "tower": tower, "block": block, "family": towers.family_of(self.path) or tower,
            "module": towers.inside_block(self.path) if block is not None else self.path.rpartition(".")[2],
        }  # fmt: skip
        numbers = self._of_update(W, min(self.rank or rank, *W.shape))
        return names | {name: _rounded(value) for name, value in numbers.items()}

    def _of_update(self, W: Tensor, r: int) -> LayerRow:
        update, norm, tuned = self._change(W, r)
        full = decompose(W, min(W.shape), "principal")
        top = decompose(tuned, min(INTRUDER_K, *W.shape), "principal")
        of_update, of_base = amplification(W, update, r)
        like_top, like_bottom, like_random = similarities(full, update, r)
        return {
            "method": self.method,
            "rank": r,
            "norm": full.norm,
            "update_norm": norm,
            "relative_update": norm / full.norm if full.norm else None,
            "amplification": of_update / of_base if of_base else None,
            "update_inside": of_update,
            "base_inside": of_base,
            "base_inside_top": torch.linalg.vector_norm(full.S[:r].double()),
            "base_inside_random": expected_inside(full.norm, (W.shape[0], W.shape[1]), r),
            "similarity_top": like_top,
            "similarity_bottom": like_bottom,
            "similarity_random": like_random,
            "intruders": intruders(full, top.U),
            **self._moves(),
        }

    def _change(self, W: Tensor, rank: int) -> tuple[LowRankUpdate, float, Tensor]:
        """Return the change of W (out, in) as its first triplets (`rank` or all), its norm, and the tuned weight."""
        if isinstance(self.after, LoraLayer):
            after: Any = self.after
            A, B = (factor.detach().to(W).flatten(1) for factor in factors(after, "default"))
            B = after.scaling["default"] * B
            tuned = W + B @ A
            if not after.use_dora["default"]:
                update = LowRankUpdate.from_factors(B, A)
                return update, float(torch.linalg.vector_norm(update.S)), tuned
            magnitude = after.lora_magnitude_vector["default"].weight.detach().to(W).flatten()
            tuned = (magnitude / torch.linalg.vector_norm(tuned, dim=1))[:, None] * tuned
        else:
            tuned = read_matrix(self.after).to(W)
        change = tuned - W
        return LowRankUpdate.from_matrix(change, rank), float(torch.linalg.matrix_norm(change.double())), tuned

    def _moves(self) -> dict[str, float | None]:
        """Return the relative distance of A and B from their start, or their norms if B started at 0 (LoRA)."""
        if not isinstance(self.after, LoraLayer):
            return {}
        A, B = factors(self.after, "default")
        if has_anchor(self.after, "default"):  # [D; A0] and [B0 + E, E]
            A0, B0 = anchors_of(self.after, "default")
            D, E = A.chunk(2, dim=0)[0], B.chunk(2, dim=1)[1]
            return {"moved_A": moved(D, A0), "moved_B": moved(E, B0)}
        norms = (float(torch.linalg.vector_norm(factor.double())) for factor in (A, self.after.scaling["default"] * B))
        return dict(zip(("norm_A", "norm_B"), norms, strict=True))


def layers_of(subject: str, base: str | None = None, *, allow_base_mismatch: bool = False) -> tuple[str, list[Layer]]:
    """Load the models to compare, and return the base and the layers that differ.

    `base` may be None for an adapter, which names its own. Raises UserError if subject and base model do not fit.
    """
    folder = Path(subject)
    if holds_adapter(folder):
        base = base or base_of(folder)
        model = load_any(load_weights(base), folder, allow_base_mismatch=allow_base_mismatch)
        layers = list(_of_adapter(model))
        config = model.peft_config["default"].to_dict()
        others = ("bias", "lora_bias", "trainable_token_indices")
        if left_out := [name for name in others if config.get(name) not in (None, False, "none")]:
            sys.stderr.write(f"note: the adapter also trained what is no matrix: {', '.join(left_out)}\n")
    else:
        assert base is not None
        is_projector = holds_projector_alone(folder)
        tuned = load_weights(base if is_projector else subject)
        if is_projector:
            load_projector(tuned, folder)
        layers = list(_of_models(load_weights(base), tuned, f"{subject} is not a fine-tuned {base}"))
    if not layers:
        hint = "check --base: it should be the model before the training"
        raise UserError(f"changes no matrix of {base}", where=subject, hint=hint)
    return base, layers


def _of_adapter(model: PeftModel) -> Iterator[Layer]:
    """Yield the LoRA layers of a model, and the matrices of modules trained in full."""
    base: nn.Module = model.get_base_model()
    towers = find_towers(base)
    targets = {target.path: target for target in model.milora_targets} if isinstance(model, MiloraMixin) else {}
    for path, module in base.named_modules():
        if isinstance(module, LoraLayer):
            target = targets.get(path)
            method = target.method if target else "dora" if module.use_dora["default"] else "lora"
            rank = target.rank if target and target.rank else module.r["default"]
            adapted: Any = module  # PEFT mixes the class into modules
            yield Layer(path, towers, module.get_base_layer(), adapted, method, rank)
        elif isinstance(module, ModulesToSaveWrapper):
            for inner, before in module.original_module.named_modules():
                if is_adaptable(before):
                    after = module.modules_to_save["default"].get_submodule(inner)
                    yield Layer(f"{path}.{inner}".rstrip("."), towers, before, after)


def _of_models(base: nn.Module, tuned: nn.Module, message: str) -> Iterator[Layer]:
    """Yield every matrix of a fully tuned model that differs. Raises UserError if the models do not fit."""
    towers, after = find_towers(base), matrices(tuned)
    pairs = [(path, module, after[path]) for path, module in matrices(base).items() if path in after]
    hint = "name the base model of the training:  --base NAME-OR-FOLDER"
    if not pairs:
        raise UserError(f"{message}: they have no layer in common", where="--base", hint=hint)
    for path, old, new in pairs:
        W, tuned_W = read_matrix(old), read_matrix(new)
        if W.shape != tuned_W.shape:
            raise UserError(f"{message}: {path} has another shape", where="--base", hint=hint)
        if not torch.equal(W.float(), tuned_W.float()):
            yield Layer(path, towers, old, new)


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers and convolutions of blocks and projector, or all linear layers of a model without."""
    towers, modules = find_towers(model), dict(model.named_modules())
    inside = {
        path: module
        for path, module in modules.items()
        if (is_linear(module) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and (towers.block_of(path) is not None or towers.tower_of(path) == "projector")
    }
    return inside or {path: module for path, module in modules.items() if is_linear(module)}


def rows_of(layers: Sequence[Layer], device: str | None, rank: int, store: Path) -> list[LayerRow]:
    """Return a row for every layer. `device` is the value of --device.

    The file `store` keeps each row with a hash of its weights: an analysis that was interrupted computes the others.
    """
    rows, on = list[LayerRow](), device_named(device)
    stored = {line["key"]: line["row"] for line in json_lines(store)}
    store.parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), store.open("a") as file, progress_bar("analysing", len(layers), "layers") as bar:
        for layer in layers:
            key = f"{layer.path} {rank} {weights_digest(layer.before)} {weights_digest(layer.after)}"
            if key not in stored:
                stored[key] = layer.row(on, rank)
                file.write("\n" + json.dumps({"key": key, "row": stored[key]}))  # not behind a line that was cut off
                file.flush()
            rows.append(stored[key])
            bar.update()
    return rows


def _rounded(value: Any) -> Any:
    return float(f"{float(value):.6g}") if isinstance(value, float | Tensor) else value
