"""The models that have a name here, and the files that a projector alone is saved in. Needs no torch."""

from __future__ import annotations

from milora_data.errors import UserError

PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
# Name -> id on the model hub; those of MADE_HERE need no hub.
NAMED_MODELS: dict[str, str] = {
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "llava-v1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-v1.6-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "llava-v1.6-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "smol-llava": "SmolLM2-135M-Instruct + EfficientNet-Lite0, made here at first use",
    "smol-llava-unaligned": "the same before stage 1, with a fresh projector",
    "smollm2": "SmolLM2-135M-Instruct, text only, made here at first use",
    "tiny": "random weights, for tests",
    "tiny-text": "random weights, text only, for tests",
}


# Names by which LLaVA's own scripts call the same weights in another layout.
SAME_WEIGHTS = {
    "liuhaotian/llava-v1.5-7b": "llava-1.5-7b",
    "liuhaotian/llava-v1.5-13b": "llava-1.5-13b",
    "liuhaotian/llava-v1.6-vicuna-7b": "llava-v1.6-vicuna-7b",
    "liuhaotian/llava-v1.6-vicuna-13b": "llava-v1.6-vicuna-13b",
    "liuhaotian/llava-v1.6-mistral-7b": "llava-v1.6-mistral-7b",
}


# Parts whose configs lie inside those of the package (LLaVA's scripts start from them): a dry run needs no hub.
PART_OF: dict[str, tuple[str, str, dict[str, int]]] = {
    "lmsys/vicuna-7b-v1.5": ("llava-1.5-7b", "text_config", {"vocab_size": 32000}),
    "lmsys/vicuna-13b-v1.5": ("llava-1.5-13b", "text_config", {"vocab_size": 32000}),
    "smollm2": ("smol-llava", "text_config", {"vocab_size": 49152}),
    "openai/clip-vit-large-patch14-336": ("llava-1.5-7b", "vision_config", {}),
    "openai/clip-vit-large-patch14": ("llava-1.5-7b", "vision_config", {"image_size": 224}),
}


MADE_IN_MEMORY = ("tiny", "tiny-text")
MADE_HERE = ("smol-llava", "smol-llava-unaligned", "smollm2", "tiny", "tiny-text")


class UnknownModelError(UserError):
    """A model that is neither named here, nor a folder, nor a hub id."""
