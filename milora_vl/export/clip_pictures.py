"""The pictures of a LLaVA in a GGUF file (mmproj): a CLIP tower and a projector of two layers.

llama.cpp computes the tower up to `clip.vision.feature_layer`, leaves out the class token, and applies the projector.
Its convert_hf_to_gguf.py converts no LLaVA with a CLIP tower: of its class it knows Pixtral alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from milora_vl.common.errors import UserError

PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}


def has_clip_tower(config: Any) -> bool:
    """Return whether this is a LLaVA with a CLIP tower, whose pictures `write_pictures` writes."""
    return bool(config.model_type == "llava" and config.vision_config.model_type == "clip_vision_model")


def why_no_pictures(config: Any) -> str | None:
    """Return why llama.cpp cannot read the pictures of this LLaVA; None if it can, and for other families."""
    if config.model_type != "llava" or config.vision_config.model_type == "pixtral":
        return None
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        return f"llama.cpp reads a LLaVA with a CLIP tower; this one has {vision.model_type}"
    read = (config.projector_hidden_act, config.vision_feature_select_strategy) == ("gelu", "default")
    if not read or not isinstance(config.vision_feature_layer, int) or vision.hidden_act not in ("quick_gelu", "gelu"):
        return (
            "llama.cpp reads one layer of a tower with quick_gelu or gelu, without the class token, and a projector "
            f"with gelu; this one has {config.vision_feature_layer}, {vision.hidden_act}, "
            f"{config.vision_feature_select_strategy} and {config.projector_hidden_act}"
        )
    return None


def require_gguf() -> None:
    """Raise UserError if the package gguf is not installed."""
    try:
        import gguf  # noqa: F401 - write_pictures uses it
    except ModuleNotFoundError:
        raise UserError(
            "the file for the pictures needs the package gguf, which is not installed",
            code="package-missing",
            where="--to",
            hint="pip install -e '.[demo]'   (or pip install gguf)",
        ) from None


def write_pictures(path: Path, config: Any, state: Mapping[str, Tensor], image_processor: Any, outtype: str) -> None:
    """Write the mmproj file of a LLaVA; `state` is the state dict of the whole model, `outtype` f32 or f16."""
    import gguf

    vision, layer = config.vision_config, config.vision_feature_layer
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_block_count(vision.num_hidden_layers)
    writer.add_vision_projection_dim(config.get_text_config().hidden_size)
    writer.add_array("clip.vision.feature_layer", [layer % (vision.num_hidden_layers + 1)])
    writer.add_string("clip.vision.mm_patch_merge_type", "flat")
    writer.add_vision_image_mean([float(x) for x in image_processor.image_mean])
    writer.add_vision_image_std([float(x) for x in image_processor.image_std])
    if vision.hidden_act == "gelu":
        writer.add_vision_use_gelu(True)
    for name, tensor in _tensors(state, vision.num_hidden_layers).items():
        is_half = outtype == "f16" and tensor.dim() > 1  # vectors stay float32
        writer.add_tensor(name, tensor.detach().float().numpy().astype(np.float16 if is_half else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(state: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Return the tensors by name in GGUF; the norm behind the last layer is not used, and left out."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, blocks)
    tensors = {}
    for full_name, tensor in state.items():
        name = full_name.removeprefix("model.")
        if name.startswith("multi_modal_projector."):
            _, layer, kind = name.split(".")
            tensors[f"{PROJECTOR[layer]}.{kind}"] = tensor
        elif name.startswith("vision_tower.") and "post_layernorm" not in name and "position_ids" not in name:
            inside = name.removeprefix("vision_tower.").removeprefix("vision_model.")
            known = table.get_name(f"vision_tower.vision_model.{inside}", try_suffixes=(".weight", ".bias"))
            assert known is not None, f"{name} is no weight of a CLIP tower"
            tensors[known] = tensor
    return tensors
