"""Models in the layout of haotian-liu/LLaVA: one config.json that describes a Llama and names its CLIP tower.

`mm_vision_tower` in config.json identifies them. `model_type` does not: in LLaVA-1.5 it is `llava`, which transformers
mistakes for its own class.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import has_config
from milora_vl.core.weights.tensor_files import read_weights

MARK = "mm_vision_tower"
PROJECTOR = re.compile(r"^model\.mm_projector\.(.+)")
TOWER = re.compile(r"^model\.vision_tower\.vision_tower\.(.+)")
# model_type of LLaVA -> model_type of its language model in transformers.
_LANGUAGE = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
# The values of LLaVA-1.5, which Hugging Face's LLaVA supports; None is a missing key.
_SUPPORTED: dict[str, tuple[str | bool | None, ...]] = {
    "model_type": tuple(_LANGUAGE),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_start_end": (False, None),
    "mm_patch_merge_type": ("flat", None),
    "image_aspect_ratio": ("pad", "square", None),
}


@dataclass(frozen=True, slots=True)
class Original:
    folder: Path
    vision_tower: str
    select_layer: int
    select_feature: str
    text: Mapping[str, Any]  # config of the language model

    def text_config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(**self.text)

    def tensors(self, names: re.Pattern[str]) -> dict[str, Tensor]:
        """Return the weights whose names match, by the group of the pattern. Reads no other weights."""
        matching: dict[str, Tensor] = {}
        for keys, read in _weight_files(self.folder):
            for key in keys:
                match = names.match(key)
                if match:
                    matching[match[1]] = read(key)
        return matching


def is_original(folder: Path) -> bool:
    return MARK in _config(folder) and not has_config(folder)


def read_original(folder: Path) -> Original:
    """Read the config of such a folder. Raises UserError for settings that Hugging Face's LLaVA does not support."""
    config = _config(folder)
    for name, supported in _SUPPORTED.items():
        if config.get(name) not in supported:
            raise UserError(
                "a LLaVA in its original layout that Hugging Face's LLaVA cannot hold: "
                f"{name} {config.get(name)}, expected {' or '.join(str(value) for value in supported if value)}",
                where=str(folder),
                hint="for LLaVA-1.6, use a model in Hugging Face's layout (llava-hf/llava-v1.6-...)",
            )
    dropped = ("model_type", "architectures", "_name_or_path", "transformers_version", "auto_map", "image_aspect_ratio")
    text = {k: v for k, v in config.items() if k not in dropped and not re.match(r"(use_)?mm_|tune_mm|freeze_mm", k)}
    text = {name: value for name, value in text.items() if not name.startswith(("image_", "tokenizer_"))}
    return Original(
        folder,
        str(config[MARK]),
        int(config.get("mm_vision_select_layer", -2)),
        str(config.get("mm_vision_select_feature", "patch")),
        {"model_type": _LANGUAGE[config["model_type"]], **text},
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _weight_files(folder: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor]]]:
    from safetensors import safe_open

    files = sorted(folder.glob("model*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as opened:
            yield list(opened.keys()), opened.get_tensor
    for file in [] if files else sorted(folder.glob("pytorch_model*.bin")):
        state = read_weights(file, mmap=True)
        yield list(state), lambda key, state=state: state[key].clone()  # type: ignore[misc]
