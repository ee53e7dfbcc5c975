"""Read and write a PEFT LoRA folder as tensors, without a base model: factors by module, modules trained in full."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from milora_vl.common.errors import UserError, expected_format
from milora_vl.core.adapter.folders import ADAPTER_FILES, CONFIG, PEFT_PREFIX
from milora_vl.core.adapter.sidecar import Sidecar, read_sidecar, stored_tensors

Value = TypeVar("Value")
_FACTOR_A = re.compile(r"(?P<path>.+)\.(?P<name>lora_A\.weight|lora_embedding_A)")
# Fields of adapter_config.json with which a LoRA is more than s B A added to a weight, and a name for each.
_MORE_THAN_FACTORS = {
    "use_dora": "DoRA weights",
    "alora_invocation_tokens": "an activated LoRA (aLoRA)",
    "trainable_token_indices": "trained rows of the embeddings (trainable_token_indices)",
    "layer_replication": "a LoRA on copies of layers (layer_replication)",
    "lora_bias": "a LoRA with trained biases (lora_bias)",
    "use_qalora": "a QALoRA",
    "use_bdlora": "a block-diagonal LoRA",
    "arrow_config": "a LoRA with a router (Arrow)",
    "kasa_config": "a KaSA",
}


@dataclass(frozen=True, slots=True)
class LowRank:
    """The stored factors of one module: A (r, in...) and B (out..., r); the update is their product times `scaling`.

    With `is_embedding` they are A (r, tokens) and B (dim, r), and their product is the transpose of the update.
    """

    A: Tensor
    B: Tensor
    scaling: float
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and scaling * B (out, r) in float32; a convolution's kernel is flattened."""
        return self.A.float().flatten(1), self.scaling * self.B.float().flatten(1)

    def cast(self, dtype: torch.dtype) -> LowRank:
        return replace(self, A=self.A.to(dtype), B=self.B.to(dtype))

    def replaced(self, A: Tensor, B: Tensor, scaling: float) -> LowRank:
        """Return new factors, of any rank, for the same module; the matrices are reshaped to its shapes."""
        tail_A, tail_B = self.A.shape[1:], self.B.shape[2:]
        return LowRank(A.reshape(-1, *tail_A), B.reshape(self.B.shape[0], -1, *tail_B), scaling, self.is_embedding)


@dataclass(frozen=True, slots=True)
class PlainAdapter:
    """The content of a LoRA folder. `whole` holds weights of modules trained in full, by their name in the base.

    `copies`: base weights by module that PEFT also saves for embeddings with an adapter. `anchors`: the exact B0 by
    module, where [B0 + E, E] does not give it.
    """

    base: str
    factors: Mapping[str, LowRank]
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    dropout: float = 0.0
    task_type: str | None = None
    sidecar: Sidecar | None = None
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    anchors: Mapping[str, Tensor] = field(default_factory=dict)

    def moved(self, new_path: Callable[[str], str]) -> PlainAdapter:

        def moved(by_path: Mapping[str, Value]) -> dict[str, Value]:
            return {new_path(path): value for path, value in by_path.items()}

        parts = {name: name.rpartition(".") for name in self.whole}
        return replace(
            self,
            factors=moved(self.factors),
            whole={f"{new_path(parts[name][0])}.{parts[name][2]}": tensor for name, tensor in self.whole.items()},
            copies=moved(self.copies),
            anchors=moved(self.anchors),
            sidecar=None,
        )

    def cast(self, dtype: torch.dtype | None) -> PlainAdapter:
        if dtype is None:
            return self
        factors = {path: low.cast(dtype) for path, low in self.factors.items()}
        whole = {name: t.to(dtype) for name, t in self.whole.items()}
        return replace(self, factors=factors, whole=whole, anchors={})


def read_plain(folder: Path) -> PlainAdapter:
    """Read a LoRA folder. Raises UserError for other adapter types, DoRA, trained biases, or unknown tensor names."""
    message, hint = "the files of this adapter do not belong together", "restore the files of one save"
    with expected_format(message, code="adapter-damaged-file", where=str(folder), hint=hint):
        config = read_config(folder)
        weights = stored_tensors(folder)
        return from_state(weights, config, folder, read_sidecar(folder))


def read_config(folder: Path, *, any_lora: bool = False) -> LoraConfig:
    """Read adapter_config.json. Raises UserError if it is not a LoRA or (unless `any_lora`) more than two factors."""
    kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("peft_type")
    if kind != "LORA":
        message = f"unsupported adapter type {kind}: only adapters saved as LoRA can be exported"
        hint = "save it as a LoRA, or merge it into its base with PEFT's merge_and_unload"
        raise UserError(message, code="adapter-unsupported-kind", where=str(folder), hint=hint)
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    more = list(more_than_factors(folder).values())
    if more and not any_lora:
        message = f"the folder holds {more[0]}, not plain pairs of factors"
        hint = "use --to merged (if PEFT can merge it), or load the folder with PEFT"
        raise UserError(message, code="adapter-unsupported-kind", where=str(folder), hint=hint)
    return config


def more_than_factors(folder: Path) -> dict[str, str]:
    """Return the fields of adapter_config.json with which a LoRA is more than two factors, and a name for each."""
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return {name: what for name, what in _MORE_THAN_FACTORS.items() if content.get(name)}


def from_state(
    weights: Mapping[str, Tensor], config: LoraConfig, folder: Path, sidecar: Sidecar | None
) -> PlainAdapter:
    state = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in weights.items()}
    factors, used = {}, set()
    for key, A in state.items():
        match = _FACTOR_A.fullmatch(key)
        other = key.replace("lora_A.", "lora_B.").replace("lora_embedding_A", "lora_embedding_B")
        if match is not None and other in state:
            path = match["path"]
            low = LowRank(A, state[other], _scaling(config, path, A.shape[0]), "embedding" in match["name"])
            factors[path] = low
            used |= {key, other}
    whole = {key: tensor for key, tensor in state.items() if key not in used}
    copies = {path: whole.pop(key) for path in factors if (key := f"{path}.base_layer.weight") in whole}
    odd = [key for key in whole if ".lora_" in key or (config.bias != "none" and key.endswith(".bias"))]
    if odd:
        message, hint = f"the folder holds more than LoRA factors and whole modules: {odd[0]}", "use --to merged"
        raise UserError(message, code="adapter-unsupported-kind", where=str(folder), hint=hint)
    base = str(config.base_model_name_or_path or "")
    anchors = {} if sidecar is None else sidecar.read_anchors(folder)
    return PlainAdapter(base, factors, whole, config.lora_dropout, config.task_type, sidecar, copies, anchors)


def _scaling(config: LoraConfig, path: str, rank: int) -> float:
    patterns = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(list(patterns), path), config.lora_alpha)
    return float(alpha / rank**0.5 if config.use_rslora else alpha / rank)


def write_plain(
    adapter: PlainAdapter, folder: Path, known_keys: frozenset[str] | None = None, *, uniform: bool = False
) -> None:
    """Write config and weights (not milora.json). `known_keys` limits the keys of the config.

    With `uniform` all modules get the same rank and scale: factors are padded with zeros and multiplied by their scale.
    Programs without rank_pattern and alpha_pattern need this.
    """
    adapter = _uniform(adapter) if uniform else adapter
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = {PEFT_PREFIX + name: tensor for name, tensor in adapter.whole.items()}
    for path, factors in adapter.factors.items():
        names = ("lora_embedding_A", "lora_embedding_B") if factors.is_embedding else ("lora_A.weight", "lora_B.weight")
        state |= {f"{PEFT_PREFIX}{path}.{names[0]}": factors.A, f"{PEFT_PREFIX}{path}.{names[1]}": factors.B}
    save_file({key: t.contiguous() for key, t in state.items()}, folder / ADAPTER_FILES[0], metadata={"format": "pt"})
    content = config_of_factors(adapter).to_dict()
    if known_keys is not None:
        content = {key: value for key, value in content.items() if key in known_keys}
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}
    (folder / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_ours(adapter: PlainAdapter, folder: Path) -> None:
    write_plain(adapter, folder)
    if adapter.sidecar is not None:
        adapter.sidecar.write(folder, adapter.anchors)


def config_of_factors(adapter: PlainAdapter) -> LoraConfig:
    """Return PEFT's config for the factors: full paths, the most common rank and alpha, patterns for the others."""
    ranks = {path: f.rank for path, f in adapter.factors.items()}
    alphas = {path: _number(f.scaling * f.rank) for path, f in adapter.factors.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha: Any = Counter(alphas.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=adapter.dropout,
        target_modules=sorted(ranks),
        rank_pattern={f"^{path}": r for path, r in ranks.items() if r != rank},
        alpha_pattern={f"^{path}": a for path, a in alphas.items() if a != alpha},
        modules_to_save=whole_modules(adapter.whole) or None,
        task_type=adapter.task_type,
        base_model_name_or_path=adapter.base,
        inference_mode=True,
    )


def whole_modules(whole: Mapping[str, Tensor]) -> list[str]:
    """Return the modules that hold the named weights, without modules inside other modules of the list.

    >>> whole_modules({"projector.scale": torch.ones(1), "projector.norm.weight": torch.ones(1)})
    ['projector']
    """
    modules = {name.rpartition(".")[0] for name in whole}
    return sorted(m for m in modules if not any(m.startswith(f"{other}.") for other in modules))


def _number(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _uniform(adapter: PlainAdapter) -> PlainAdapter:
    rank = max(factors.rank for factors in adapter.factors.values())
    factors = {}
    for path, low in adapter.factors.items():
        A, B, extra = low.A, (low.scaling * low.B.float()).to(low.B.dtype), rank - low.rank
        A = torch.cat([A, A.new_zeros(extra, *A.shape[1:])])
        B = torch.cat([B, B.new_zeros(B.shape[0], extra, *B.shape[2:])], dim=1)
        factors[path] = LowRank(A, B, 1.0, low.is_embedding)
    return replace(adapter, factors=factors, sidecar=None)
