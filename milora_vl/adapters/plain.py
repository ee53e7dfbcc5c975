"""A stock PEFT LoRA folder as plain tensors: factors by module, whole weights by name. Needs no base model.

Forms that need one (merged, residual) are made of a loaded model; all others are made of this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import load_peft_weights
from torch import Tensor

from milora_data.errors import UserError
from milora_vl.lora.sidecar import Sidecar, read_sidecar

PREFIX = "base_model.model."
_FACTOR_A = re.compile(r"(?P<path>.+)\.(?P<name>lora_A\.weight|lora_embedding_A)")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Fields of adapter_config.json with which a LoRA is more than s B A added to a weight, and what to call it.
_MORE_THAN_FACTORS = {
    "use_dora": "DoRA weights",
    "alora_invocation_tokens": "an activated LoRA (aLoRA)",
    "trainable_token_indices": "rows of the embeddings trained by themselves (trainable_token_indices)",
    "layer_replication": "a LoRA on copies of layers (layer_replication)",
    "lora_bias": "a LoRA with biases of its own (lora_bias)",
    "use_qalora": "a QALoRA",
    "use_bdlora": "a block-diagonal LoRA",
    "arrow_config": "a LoRA with a router (Arrow)",
    "kasa_config": "a KaSA",
}


@dataclass(frozen=True, slots=True)
class LowRank:
    """The factors of one module as stored: A (r, in...) and B (out..., r), their product times `scaling` is the change.

    `is_embedding` tells of A (r, tokens) and B (dim, r), whose product is the transpose of the weight's change.
    """

    A: Tensor
    B: Tensor
    scaling: float
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """The rank of the stored factors."""
        return self.A.shape[0]

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and scaling * B (out, r) in float32; a convolution's kernel is flattened."""
        return self.A.float().flatten(1), self.scaling * self.B.float().flatten(1)

    def cast(self, dtype: torch.dtype) -> LowRank:
        """Return the factors in `dtype`."""
        return replace(self, A=self.A.to(dtype), B=self.B.to(dtype))

    def replaced(self, A: Tensor, B: Tensor, scaling: float) -> LowRank:
        """Return factors (matrices) of another rank for the same module, in its shapes."""
        tail_A, tail_B = self.A.shape[1:], self.B.shape[2:]
        return LowRank(A.reshape(-1, *tail_A), B.reshape(self.B.shape[0], -1, *tail_B), scaling, self.is_embedding)


@dataclass(frozen=True, slots=True)
class PlainAdapter:
    """The content of a LoRA folder. `whole` holds modules trained in full, by the name of each weight in the base.

    `copies`: weights of the base that PEFT saved along, by module; it does so for embeddings that hold an adapter.
    """

    base: str
    factors: Mapping[str, LowRank]
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    dropout: float = 0.0
    task_type: str | None = None
    sidecar: Sidecar | None = None
    copies: Mapping[str, Tensor] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype | None) -> PlainAdapter:
        """Return it with every number in `dtype`; None leaves them."""
        if dtype is None:
            return self
        factors = {path: low.cast(dtype) for path, low in self.factors.items()}
        whole = {name: t.to(dtype) for name, t in self.whole.items()}
        return replace(self, factors=factors, whole=whole)


def read_plain(folder: Path) -> PlainAdapter:
    """Read a LoRA folder. UserError for another kind of adapter, DoRA, trained biases, or names that are no LoRA's."""
    config = read_config(folder)
    weights = load_peft_weights(str(folder), device="cpu")
    return from_state(weights, config, folder, read_sidecar(folder))


def read_config(folder: Path, *, any_lora: bool = False) -> LoraConfig:
    """Read adapter_config.json. UserError where it is no LoRA's, or (unless `any_lora`) more than two factors."""
    kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder} holds an adapter of type {kind}: only LoRA and what is saved as one can be exported")
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    more = list(more_than_factors(folder).values())
    if more and not any_lora:
        raise UserError(
            f"{folder} holds {more[0]}, no plain pairs of factors\n"
            "possible:  --to merged (where PEFT can merge it), or loading the folder with PEFT"
        )
    return config


def more_than_factors(folder: Path) -> dict[str, str]:
    """Return the fields of adapter_config.json with which a LoRA is more than two factors, and what to call each."""
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return {name: what for name, what in _MORE_THAN_FACTORS.items() if content.get(name)}


def from_state(
    weights: Mapping[str, Tensor], config: LoraConfig, folder: Path, sidecar: Sidecar | None
) -> PlainAdapter:
    """Sort stored tensors into factors and whole weights."""
    state = {key.removeprefix(PREFIX): tensor for key, tensor in weights.items()}
    factors, used = {}, set()
    for key, A in state.items():
        found = _FACTOR_A.fullmatch(key)
        other = key.replace("lora_A.", "lora_B.").replace("lora_embedding_A", "lora_embedding_B")
        if found is not None and other in state:
            path = found["path"]
            low = LowRank(A, state[other], _scaling(config, path, A.shape[0]), "embedding" in found["name"])
            factors[path] = low
            used |= {key, other}
    rest = {key: tensor for key, tensor in state.items() if key not in used}
    copies = {path: rest.pop(key) for path in factors if (key := f"{path}.base_layer.weight") in rest}
    odd = [key for key in rest if ".lora_" in key or (config.bias != "none" and key.endswith(".bias"))]
    if odd:
        raise UserError(f"{folder} holds more than LoRA factors and whole modules: {odd[0]}\npossible:  --to merged")
    base = str(config.base_model_name_or_path or "")
    return PlainAdapter(base, factors, rest, config.lora_dropout, config.task_type, sidecar, copies)


def _scaling(config: LoraConfig, path: str, rank: int) -> float:
    patterns = config.alpha_pattern or {}
    alpha = patterns.get(_pattern_key(list(patterns), path), config.lora_alpha)
    return float(alpha / rank**0.5 if config.use_rslora else alpha / rank)


def _pattern_key(patterns: list[str], path: str) -> str:
    """The key of alpha_pattern that means a module, by PEFT's rule; else the path itself."""
    from peft.utils.other import get_pattern_key

    return str(get_pattern_key(patterns, path))


def write_plain(
    adapter: PlainAdapter, folder: Path, known_keys: frozenset[str] | None = None, *, uniform: bool = False
) -> None:
    """Write config and weights (not milora.json). `known_keys` leaves only these in the config.

    With `uniform` all modules get one rank and one scale, by zero rows and factors times their scale: programs that
    read no rank_pattern or alpha_pattern need it.
    """
    from safetensors.torch import save_file

    adapter = _uniform(adapter) if uniform else adapter
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = {PREFIX + name: tensor for name, tensor in adapter.whole.items()}
    for path, factors in adapter.factors.items():
        names = ("lora_embedding_A", "lora_embedding_B") if factors.is_embedding else ("lora_A.weight", "lora_B.weight")
        state |= {f"{PREFIX}{path}.{names[0]}": factors.A, f"{PREFIX}{path}.{names[1]}": factors.B}
    save_file({key: t.contiguous() for key, t in state.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    content = config_of(adapter).to_dict()
    if known_keys is not None:
        content = {key: value for key, value in content.items() if key in known_keys}
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}
    (folder / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def config_of(adapter: PlainAdapter) -> LoraConfig:
    """Return PEFT's config for the factors: full paths, most common rank and alpha, the others by pattern."""
    from collections import Counter

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
    """Return the modules that hold the weights named; one inside another, which holds it, is not named itself.

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
