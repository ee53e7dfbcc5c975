"""The layout of haotian-liu/LLaVA: `adapter_*` with its key names, `non_lora_trainables.bin`, its `config.json`.

Read and written so that LLaVA's own `load_pretrained_model` (llava/model/builder.py) takes it. Names as in
transformers' convert_llava_weights_to_hf.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milora_data.errors import UserError
from milora_vl.adapters.plain import PREFIX, LowRank, PlainAdapter, read_plain, write_plain
from milora_vl.lora.sidecar import locate
from milora_vl.towers import Towers
from milora_vl.weights.torch_files import UNREAD, read_pickled, why_unread

NON_LORA = "non_lora_trainables.bin"
# What LoraConfig knew at the time of LLaVA's pins (transformers 4.37.2, accelerate 0.21); PEFT refused any other key.
KNOWN_KEYS = frozenset(
    "auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights layers_pattern "
    "layers_to_transform lora_alpha lora_dropout modules_to_save peft_type r revision target_modules task_type".split()
)
# Fields of the language model's config that LLaVA's LlavaConfig (a LlamaConfig) has too.
_LLAMA_FIELDS = (
    "attention_bias attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_range "
    "intermediate_size max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads "
    "pretraining_tp rms_norm_eps tie_word_embeddings vocab_size"
).split()
_CLIP_L_336 = {"hidden_size": 1024, "image_size": 336, "patch_size": 14, "num_hidden_layers": 24}

# Where the parts are in each layout, without a model at hand: the same names as `Towers.canonical` of a loaded one.
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


def is_llava_folder(folder: Path) -> bool:
    """Tell whether the folder was written by LLaVA's train.py with LoRA."""
    return (folder / NON_LORA).is_file() and (folder / "adapter_config.json").is_file()


def canonical_of_original(path: str) -> str:
    """Return the layout-free name of a module of LLaVA's own classes.

    >>> canonical_of_original("model.layers.0.mlp.up_proj"), canonical_of_original("model.mm_projector.2")
    ('language.layers.0.mlp.up_proj', 'projector.linear_2')
    """
    path = path.replace("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_tower.")
    return _ORIGINAL.canonical(path)


def canonical_of_any(path: str) -> str:
    """Return the layout-free name of a module of HF's LLaVA, of any version of transformers, or of LLaVA's own.

    >>> canonical_of_any("language_model.model.layers.0.mlp.up_proj")
    'language.layers.0.mlp.up_proj'
    """
    path = re.sub(r"^language_model\.model\.", "model.language_model.", path)
    path = re.sub(r"^language_model\.lm_head", "lm_head", path)
    path = re.sub(r"^(multi_modal_projector|vision_tower)", r"model.\1", path)
    path = path.replace("model.vision_tower.vision_model.", "model.vision_tower.")
    return _HF.canonical(path) if _HF.tower_of(path) is not None else canonical_of_original(path)


def original_path(canonical: str) -> str:
    """Return the path in LLaVA's own classes of a module with that layout-free name.

    UserError for modules of the vision tower, which LLaVA loads after the adapter.

    >>> original_path("projector.linear_1"), original_path("language.norm"), original_path("language.lm_head")
    ('model.mm_projector.0', 'model.norm', 'lm_head')
    """
    tower, _, rest = canonical.partition(".")
    if tower == "language":
        return rest if rest == "lm_head" else f"model.{rest}"
    layer = re.fullmatch(r"linear_(\d)", rest)
    if tower == "projector" and layer:
        return f"model.mm_projector.{2 * (int(layer[1]) - 1)}"
    raise UserError(
        f"LLaVA's layout has no place for {canonical}: its loader brings in the vision tower after the adapter\n"
        "possible:  --to merged"
    )


def write_llava(
    adapter: PlainAdapter, folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write an adapter (HF layout) as a LoRA folder of LLaVA; `config` is the config.json to put beside it.

    The original vocabulary is shorter than HF's padded one: rows of embeddings and head beyond it are left out.
    """
    vocabulary = int(config["vocab_size"])
    sidecar = adapter.sidecar
    names = dict(sidecar.names) if sidecar is not None else {}

    def renamed(path: str) -> str:
        return original_path(names.get(path) or canonical_of_any(path))

    factors = {renamed(path): _cut(path, low, vocabulary) for path, low in adapter.factors.items()}
    whole = {}
    for name, tensor in adapter.whole.items():
        module, _, leaf = name.rpartition(".")
        is_vocabulary = module.endswith(("embed_tokens", "lm_head"))
        whole[f"{PREFIX}{renamed(module)}.{leaf}"] = tensor[:vocabulary].clone() if is_vocabulary else tensor
    moved = replace(adapter, factors=factors, whole={}, sidecar=None).cast(dtype)
    write_plain(moved, folder, KNOWN_KEYS, uniform=True)
    torch.save({name: t.to(dtype or t.dtype).contiguous() for name, t in whole.items()}, folder / NON_LORA)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def _cut(path: str, low: LowRank, vocabulary: int) -> LowRank:
    if path.endswith("embed_tokens"):
        return replace(low, A=low.A[:, :vocabulary].clone())
    return replace(low, B=low.B[:vocabulary].clone()) if path.endswith("lm_head") else low


def read_llava(folder: Path) -> PlainAdapter:
    """Read a LoRA folder of LLaVA; paths as in LLaVA's classes, the projector in `whole`."""
    adapter = read_plain(folder)
    try:
        stored = read_pickled(folder / NON_LORA)
    except UNREAD as error:
        raise UserError(why_unread(folder / NON_LORA, error)) from None
    # Older runs wrote `base_model.model.`, merged ones `model.`; LLaVA's loader strips both, so do we.
    whole = {re.sub(r"^base_model\.model\.", "", name): tensor for name, tensor in stored.items()}
    return replace(adapter, whole={**adapter.whole, **whole})


def config_for_llava(base: Any, vision_tower: str | None) -> dict[str, Any]:
    """Return LLaVA's config.json for a base model: its own if it is in LLaVA's layout, else made of HF's.

    `base` is an HF config. `vision_tower` names the CLIP model, which HF's config does not.
    """
    if base.model_type == "llava_llama":
        return dict(base.to_dict())
    if base.model_type != "llava" or base.text_config.model_type != "llama":
        raise UserError(
            f"LLaVA's layout is for LLaVA-1.5 models on Llama, this base is {base.model_type}\n"
            "possible:  --to adapter, merged, rank-r"
        )
    text, vision = base.text_config.to_dict(), base.vision_config.to_dict()
    if vision_tower is None and all(vision.get(key) == value for key, value in _CLIP_L_336.items()):
        vision_tower = "openai/clip-vit-large-patch14-336"
    if vision_tower is None:
        raise UserError(
            "which CLIP model is the vision tower? LLaVA's config.json names it, Hugging Face's does not\n"
            "say:  --vision_tower FOLDER-OR-ID"
        )
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


def in_hf_layout(adapter: PlainAdapter, names: Mapping[str, str]) -> PlainAdapter:
    """Return an adapter of LLaVA's layout with the paths of a model; `names` are its layout-free names, by path.

    UserError for modules that the model does not have.
    """
    path_by_name = {name: path for path, name in names.items()}

    def renamed(path: str) -> str:
        name = canonical_of_original(path)
        if name not in path_by_name:
            raise UserError(f"the base model has no {name} (LLaVA's {path}); is it a LLaVA in Hugging Face's layout?")
        return path_by_name[name]

    whole: dict[str, Tensor] = {}
    for name, tensor in adapter.whole.items():
        module, _, leaf = name.rpartition(".")
        whole[f"{renamed(module)}.{leaf}"] = tensor
    factors = {renamed(path): low for path, low in adapter.factors.items()}
    sidecar = None if adapter.sidecar is None else locate(adapter.sidecar, names)
    return replace(adapter, factors=factors, whole=whole, sidecar=sidecar)
