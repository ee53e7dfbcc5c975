"""Load any named model, config or processor: Hugging Face's or LLaVA's layout; models without weights (meta).

Every model without a timm tower (`smol-llava` has one) also loads without this package. A processor gets missing
fields from the model's config: many published processors do not define the number of image tokens, and then LLaVA
fails with a count mismatch.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from milora_data.encode.tokens import share_template
from milora_vl.common.compat.transformers import forget_conversions, pass_texts_unchanged, quiet_bars, whole_weights
from milora_vl.common.errors import UserError
from milora_vl.core.evaluation_mode import keep_weights_readable
from milora_vl.models import original, parts, pretrained, smol_llava
from milora_vl.models.devices import Quantization, quantization_config, unquantized
from milora_vl.models.names import BUILT_IN_MODELS, hub_id
from milora_vl.models.processors import complete_processor

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def load_weights(
    name_or_path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    quantization: Quantization | BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.integrations import is_deepspeed_zero3_enabled

    name = in_hf_layout(name_or_path)
    source = pretrained.source_of(name)
    config = pretrained.read(AutoConfig.from_pretrained, source, name)
    if original.MARK in config.to_dict():
        raise UserError(
            f"{name} is in the layout of the original LLaVA code, which only loads from a folder",
            hint=f"first:  hf download {name} --local-dir FOLDER      then --model FOLDER",
        )
    auto = AutoModelForImageTextToText if "vision_config" in config.to_dict() else AutoModelForCausalLM
    arguments: dict[str, Any] = {"dtype": dtype or "auto"}
    if quantization is not None:
        chosen = quantization
        if isinstance(chosen, str):
            with whole_weights(), torch.device("meta"):
                chosen = quantization_config(chosen, unquantized(auto.from_config(config)))
        arguments |= {"quantization_config": chosen, "device_map": {"": device or "cpu"}}
    elif device is not None and device.type != "cpu" and not is_deepspeed_zero3_enabled():
        arguments["device_map"] = {"": device}  # the weights go there from the file, not through the machine's memory
    with quiet_bars() if name in BUILT_IN_MODELS or not sys.stderr.isatty() else nullcontext():
        model = pretrained.read(auto.from_pretrained, source, name, **arguments)
    if is_deepspeed_zero3_enabled():
        forget_conversions(model)
    keep_weights_readable(model)
    pass_texts_unchanged(model)
    # The code in the folder was not used, so saved configs must not refer to it.
    vars(model.config).pop("auto_map", None)
    return model


def load_processor(name: str | Path) -> Any:
    from transformers import AutoProcessor, AutoTokenizer

    name = in_hf_layout(name)
    config = pretrained.config_of(name)
    has_images = "vision_config" in config.to_dict()
    processor = pretrained.read(
        (AutoProcessor if has_images else AutoTokenizer).from_pretrained, pretrained.source_of(name), name
    )
    if has_images:
        share_template(processor)
        complete_processor(processor, config)
    return processor


def config_of(name: str) -> Any:
    if original.is_original(Path(name)):
        return parts.planned_config(parts.parts_of_original(Path(name)))
    return pretrained.config_of(name)


def meta_model(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    has_images = "vision_config" in config.to_dict()
    with whole_weights(), torch.device("meta"):
        return (AutoModelForImageTextToText if has_images else AutoModelForCausalLM).from_config(config)


def prepare(name: str) -> None:
    """Write the folder of a model that is built at first use: smol-llava, or one in LLaVA's original layout."""
    pretrained.source_of(in_hf_layout(name))


def in_hf_layout(name: str | Path) -> str:
    """Return the name, or the converted (cached) folder of a model in LLaVA's original layout."""
    folder = Path(name)
    if not original.is_original(folder):
        return str(name)
    converted, is_new = parts.base_folder(parts.parts_of_original(folder))
    if is_new:
        sys.stderr.write(f"converted {folder} from LLaVA's original layout to Hugging Face's: {converted}\n")
    return str(converted)


def split_processor(processor: Any) -> tuple[Any, Any | None]:
    from transformers import ProcessorMixin

    if isinstance(processor, ProcessorMixin):
        return processor.tokenizer, processor.image_processor
    return processor, None


def tokenizer_at_hand(name: str) -> Any | None:
    """Return the tokenizer of a model that is on this machine, else None; asks no hub."""
    from transformers import AutoProcessor, AutoTokenizer

    source = name if Path(name).is_dir() else hub_id(name)
    if name in BUILT_IN_MODELS:
        source = str(smol_llava.folder_of(name))
    for auto in (AutoProcessor, AutoTokenizer):  # the processor may hold the chat template
        try:
            loaded = auto.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError):
            continue
        tokenizer, pictures = split_processor(loaded)
        if pictures is not None:
            share_template(loaded)
        return tokenizer
    return None
