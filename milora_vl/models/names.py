"""The short names of models (`llava-1.5-7b`, `smol-llava`, `tiny`) and their hub ids."""

from __future__ import annotations

# Name -> id on the model hub; models of BUILT_IN_MODELS need no hub.
NAMED_MODELS: dict[str, str] = {
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "llava-v1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-v1.6-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "llava-v1.6-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
    "smolvlm2-500m": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    "smolvlm2-2.2b": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    "internvl3-2b": "OpenGVLab/InternVL3-2B-hf",
    "gemma-3-4b": "google/gemma-3-4b-it",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "smol-llava": "SmolLM2-135M-Instruct + EfficientNet-Lite0, built at first use",
    "smol-llava-unaligned": "smol-llava before stage 1, with a new projector",
    "smollm2": "SmolLM2-135M-Instruct, text only, built at first use",
    "tiny": "random weights, for tests",
    "tiny-text": "random weights, text only, for tests",
}


# Names of the same weights in LLaVA's original layout.
SAME_WEIGHTS = {
    "liuhaotian/llava-v1.5-7b": "llava-1.5-7b",
    "liuhaotian/llava-v1.5-13b": "llava-1.5-13b",
    "liuhaotian/llava-v1.6-vicuna-7b": "llava-v1.6-vicuna-7b",
    "liuhaotian/llava-v1.6-vicuna-13b": "llava-v1.6-vicuna-13b",
    "liuhaotian/llava-v1.6-mistral-7b": "llava-v1.6-mistral-7b",
}


# Parts (used by LLaVA's scripts) whose configs are inside packaged configs, so that a dry run needs no hub.
PART_OF: dict[str, tuple[str, str, dict[str, int]]] = {
    "lmsys/vicuna-7b-v1.5": ("llava-1.5-7b", "text_config", {"vocab_size": 32000}),
    "lmsys/vicuna-13b-v1.5": ("llava-1.5-13b", "text_config", {"vocab_size": 32000}),
    "smollm2": ("smol-llava", "text_config", {"vocab_size": 49152}),
    "openai/clip-vit-large-patch14-336": ("llava-1.5-7b", "vision_config", {}),
    "openai/clip-vit-large-patch14": ("llava-1.5-7b", "vision_config", {"image_size": 224}),
}

BUILT_IN_MODELS = ("smol-llava", "smol-llava-unaligned", "smollm2", "tiny", "tiny-text")
