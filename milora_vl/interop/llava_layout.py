"""Read and write LLaVA's layout: `adapter_*` with its key names, `non_lora_trainables.bin`, its `config.json`.

LLaVA's `load_pretrained_model` (llava/model/builder.py) loads the folders written here. The names follow transformers'
convert_llava_weights_to_hf.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import NON_LORA, PEFT_PREFIX
from milora_vl.core.adapter.sidecar import locate
from milora_vl.core.policy.towers import Towers
from milora_vl.core.weights.tensor_files import read_weights
from milora_vl.interop.lora_folder import LowRank, PlainAdapter, read_plain, write_plain
from milora_vl.models.loading import TOWER_NAME
from milora_vl.models.timm_tower import TimmTowerConfig

# Keys of LoraConfig in the PEFT of LLaVA's pins (transformers 4.37.2, accelerate 0.21), which rejects other keys.
KNOWN_KEYS = frozenset(
    "auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights layers_pattern "
    "layers_to_transform lora_alpha lora_dropout modules_to_save peft_type r revision target_modules task_type".split()
)
# Fields of the language model's config that LLaVA's LlavaConfig (a LlamaConfig) also has.
_LLAMA_FIELDS = (
    "attention_bias attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_range "
    "intermediate_size max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads "
    "pretraining_tp rms_norm_eps tie_word_embeddings vocab_size"
).split()
_CLIP_L_336 = {"hidden_size": 1024, "image_size": 336, "patch_size": 14, "num_hidden_layers": 24}

# The paths of the parts in each layout, so that names need no model; `Towers.canonical` gives the same names.
_HF = Towers(
    "llava",
    {
        "language": ("model.language_model",),
        "projector": ("model.multi_modal_projector",),
        "vision": ("model.vision_tower",),
    },
    {"language": ("model.language_model.layers",), "vision": ("model.vision_tower.encoder.layers",)},
)
_ORIGINAL = Towers(
    "LLaVA (original)",
    {"language": ("model",), "projector": ("model.mm_projector",), "vision": ("model.vision_tower",)},
    {"language": ("model.layers",), "vision": ("model.vision_tower.vision_tower.encoder.layers",)},
)


def canonical_of_original(path: str) -> str:
    """Return the layout-free name of a module of LLaVA's classes.

    >>> canonical_of_original("model.layers.0.mlp.up_proj"), canonical_of_original("model.mm_projector.2")
    ('language.layers.0.mlp.up_proj', 'projector.linear_2')
    """
    path = path.replace("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_tower.")
    return _ORIGINAL.canonical(path)


def canonical_of_any(path: str) -> str:
    """Return the layout-free name of a module of HF's LLaVA (any version of transformers) or LLaVA's classes.

    >>> canonical_of_any("language_model.model.layers.0.mlp.up_proj")
    'language.layers.0.mlp.up_proj'
    """
    path = re.sub(r"^language_model\.model\.", "model.language_model.", path)
    path = re.sub(r"^language_model\.lm_head", "lm_head", path)
    path = re.sub(r"^(multi_modal_projector|vision_tower)", r"model.\1", path)
    path = path.replace("model.vision_tower.vision_model.", "model.vision_tower.")
    return _HF.canonical(path) if _HF.tower_of(path) is not None else canonical_of_original(path)


def original_path(canonical: str) -> str:
    """Return the path in LLaVA's classes of a module with that layout-free name.

    >>> original_path("projector.linear_1"), original_path("language.norm"), original_path("language.lm_head")
    ('model.mm_projector.0', 'model.norm', 'lm_head')
    """
    tower, _, name = canonical.partition(".")
    if tower == "language":
        return name if name == "lm_head" else f"model.{name}"
    layer = re.fullmatch(r"linear_(\d)", name)
    if tower == "projector" and layer:
        return f"model.mm_projector.{2 * (int(layer[1]) - 1)}"
    message = "LLaVA's layout does not support this module: LLaVA loads the vision tower after the adapter"
    hint = "use --to merged"
    raise UserError(message, where=canonical, hint=hint)


def write_llava(
    adapter: PlainAdapter, folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write an adapter (HF layout) as a LoRA folder of LLaVA; `config` becomes its config.json.

    The original vocabulary is shorter than HF's padded one: extra rows of embeddings and head are dropped.
    """
    vocabulary = int(config["vocab_size"])
    sidecar = adapter.sidecar
    names = dict(sidecar.names) if sidecar is not None else {}

    def renamed(path: str) -> str:
        return original_path(names.get(path) or canonical_of_any(path))

    moved = adapter.moved(renamed).cast(dtype)
    factors = {path: _cut(path, low, vocabulary) for path, low in moved.factors.items()}
    write_plain(replace(moved, factors=factors, whole={}), folder, KNOWN_KEYS, uniform=True)
    whole = {
        PEFT_PREFIX + name: (tensor[:vocabulary].clone() if _is_vocabulary(name) else tensor).contiguous()
        for name, tensor in moved.whole.items()
    }
    torch.save(whole, folder / NON_LORA)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def _is_vocabulary(name: str) -> bool:
    return name.rpartition(".")[0].endswith(("embed_tokens", "lm_head"))


def _cut(path: str, low: LowRank, vocabulary: int) -> LowRank:
    if path.endswith("embed_tokens"):
        return replace(low, A=low.A[:, :vocabulary].clone())
    return replace(low, B=low.B[:vocabulary].clone()) if path.endswith("lm_head") else low


def read_llava(folder: Path) -> PlainAdapter:
    adapter = read_plain(folder)
    stored = read_weights(folder / NON_LORA)
    # Older runs wrote `base_model.model.`, merged ones `model.`; LLaVA's loader also strips both.
    whole = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in stored.items()}
    return replace(adapter, whole={**adapter.whole, **whole})


def config_for_llava(base: Any, vision_tower: str | None) -> dict[str, Any]:
    """Return LLaVA's config.json for a base model, converted from HF's config if needed.

    `base` is an HF config. `vision_tower` names the CLIP model, which is missing in HF's config. Raises UserError if
    LLaVA does not support the base, or the name of its vision tower is unknown.
    """
    if base.model_type == "llava_llama":
        return dict(base.to_dict())
    is_llava = base.model_type == "llava" and base.text_config.model_type == "llama"
    if not is_llava or not isinstance(base.vision_feature_layer, int):
        found = f"joins layers {base.vision_feature_layer}" if is_llava else f"is {base.model_type}"
        raise UserError(
            f"LLaVA's layout supports LLaVA-1.5 models on Llama with one layer of a CLIP tower, this base {found}",
            hint="use --to adapter, merged or rank-r",
        )
    text, vision = base.text_config.to_dict(), base.vision_config.to_dict()
    vision_tower = _vision_tower(base, vision, vision_tower)
    fields = {key: text[key] for key in _LLAMA_FIELDS if text.get(key) is not None}
    rope = text.get("rope_parameters") or {}
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        **fields,
        "rope_theta": rope.get("rope_theta", text.get("rope_theta", 10000.0)),
        # HF appends <image> and padding to the vocabulary: the id of <image> is the length of the original one.
        "vocab_size": base.image_token_id,
        "mm_vision_tower": vision_tower,
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": base.vision_feature_layer,
        "mm_vision_select_feature": "patch" if base.vision_feature_select_strategy == "default" else "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "tokenizer_padding_side": "right",
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def _vision_tower(base: Any, vision: Mapping[str, Any], name: str | None) -> str:
    """Return the tower's name for LLaVA: `name`, the name in the config, or LLaVA-1.5's if the sizes fit."""
    kind, recorded = vision["model_type"], base.to_dict().get(TOWER_NAME)
    if kind == TimmTowerConfig.model_type or (kind != "clip_vision_model" and name is None):
        raise UserError(
            f"LLaVA's code loads only CLIP vision towers, this base has {recorded or kind}",
            hint="use --to adapter, merged or rank-r",
        )
    if name is not None:
        return name
    if recorded is not None and (not Path(recorded).is_absolute() or Path(recorded).is_dir()):
        return str(recorded)
    if recorded is None and all(vision.get(key) == value for key, value in _CLIP_L_336.items()):
        return "openai/clip-vit-large-patch14-336"
    reason = f"the base was composed of {recorded}, which is not there" if recorded else "the base does not name it"
    message = f"LLaVA's config.json needs the name of the CLIP model, and {reason}"
    hint = "add  --vision_tower FOLDER-OR-ID"
    raise UserError(message, where="--vision_tower", hint=hint)


def in_hf_layout(adapter: PlainAdapter, names: Mapping[str, str]) -> PlainAdapter:
    """Return an adapter of LLaVA's layout with the paths of a model; `names` are its layout-free names, by path.

    Modules that the model does not have keep their paths.
    """
    path_by_name = {name: path for path, name in names.items()}

    def renamed(path: str) -> str:
        return path_by_name.get(canonical_of_original(path), path)

    sidecar = None if adapter.sidecar is None else locate(adapter.sidecar, names)
    return replace(adapter.moved(renamed), sidecar=sidecar)
