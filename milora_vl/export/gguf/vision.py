"""The pictures of a LLaVA in a GGUF file (mmproj): a CLIP tower and a projector of two layers.

llama.cpp computes the tower up to `clip.vision.feature_layer`, leaves out the class token, and applies the projector.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from milora_vl.export.gguf.files import OutType, renamed, write, writer_of

PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}


def why_no_pictures(config: Any) -> str | None:
    """Return why llama.cpp has no class for the pictures of this model; None if it has one, or the model reads text."""
    values = config.to_dict()
    if "vision_config" not in values:
        return None
    tower = config.vision_config.model_type
    if config.model_type != "llava" or tower != "clip_vision_model":
        return f"llama.cpp reads a LLaVA with a CLIP tower; this is {config.model_type} with {tower}"
    if config.projector_hidden_act != "gelu" or config.vision_feature_select_strategy != "default":
        return (
            "llama.cpp reads a projector with gelu and features without the class token; this one has "
            f"{config.projector_hidden_act} and {config.vision_feature_select_strategy!r}"
        )
    if not isinstance(config.vision_feature_layer, int):
        return f"llama.cpp reads the features of one layer; this model joins {config.vision_feature_layer}"
    if config.vision_config.hidden_act not in ("quick_gelu", "gelu"):
        return f"llama.cpp has no activation {config.vision_config.hidden_act} in a CLIP tower"
    return None


def write_pictures(
    path: Path, config: Any, state: Mapping[str, Tensor], image_processor: Any, outtype: OutType
) -> None:
    """Write the mmproj file of a LLaVA; `state` is the state dict of the whole model."""
    vision, layer = config.vision_config, config.vision_feature_layer
    writer = writer_of(path, "clip")
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
    write(writer, _tensors(state, vision.num_hidden_layers), outtype)


def _tensors(state: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Return the tensors by name in GGUF; the norm behind the last layer is not used, and left out."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, blocks)

    def name_of(name: str) -> str | None:
        name = name.removeprefix("model.")
        if name.startswith("multi_modal_projector."):
            _, layer, kind = name.split(".")
            return f"{PROJECTOR[layer]}.{kind}"
        if not name.startswith("vision_tower.") or "post_layernorm" in name or "position_ids" in name:
            return None
        inside = name.removeprefix("vision_tower.").removeprefix("vision_model.")
        known: str | None = table.get_name(f"vision_tower.vision_model.{inside}", try_suffixes=(".weight", ".bias"))
        assert known is not None, f"{name} is no weight of a CLIP tower"
        return known

    return renamed(state, name_of)
