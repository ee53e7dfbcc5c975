"""Vision-language families put together offline: a tiny random model, its own processor class, and a chat template.

The templates follow the published ones. `{% generation %}` marks what they supervise, for the oracle; the processor
gets the template without the marks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from support.any_family import byte_tokenizer
from support.family_configs import FAMILIES, TEXT, VISION

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_PICTURES = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def parts(image: str, text: str = "{{ part.text }}") -> str:
    """Return the loop over the parts of a message."""
    return (
        "{% for part in m.content %}{% if part.type == 'image' %}"
        + image
        + "{% elif 'text' in part %}"
        + text
        + "{% endif %}{% endfor %}"
    )


def turns(image: str, ask: str, answer: str, *, start: str = "", text: str = "{{ part.text }}", end: str) -> str:
    """Return a template of turns: `ask` and `answer` open a turn of the user and the assistant, `end` closes both."""
    body = parts(image, text)
    return (
        start
        + "{% for m in messages %}{% if m.role == 'assistant' %}"
        + answer
        + "{% generation %}"
        + body
        + end.rstrip("\n")
        + "{% endgeneration %}"
        + ("{{ '\n' }}" if end.endswith("\n") else "")  # jinja drops a line break after a mark
        + "{% else %}"
        + ask
        + body
        + end
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + answer
        + "{% endif %}"
    )


def chatml(image: str) -> str:
    """Return ChatML with a default system text, as Qwen's templates have it."""
    return turns(
        image,
        "<|im_start|>{{ m.role }}\n",
        "<|im_start|>assistant\n",
        start="{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}",
        end="<|im_end|>\n",
    )


IDEFICS = (
    "BOS{% for m in messages %}{% if m.role == 'assistant' %}Assistant:{% generation %}"
    "{% if m.content[0].type != 'image' %} {% endif %}"
    + parts("<image>")
    + "<end_of_utterance>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.role.capitalize() }}:{% if m.content[0].type != 'image' %} {% endif %}"
    + parts("<image>")
    + "<end_of_utterance>\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    + parts("[IMG]")
    + "{{ eos_token }}{% endgeneration %}{% elif m.role == 'system' %}[SYSTEM_PROMPT]"
    + parts("[IMG]")
    + "[/SYSTEM_PROMPT]{% else %}[INST]"
    + parts("[IMG]")
    + "[/INST]{% endif %}{% endfor %}"
)

# Without thoughts, as the published template of Qwen3.5 has it: the last answer gets an empty block of them.
QWEN_THINKS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% generation %}"
    + parts("<|vision_start|><|image_pad|><|vision_end|>", "{{ part.text | trim }}")
    + "<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}"
    + parts("<|vision_start|><|image_pad|><|vision_end|>", "{{ part.text | trim }}")
    + "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)


@dataclass(frozen=True)
class VlmFamily:
    """How to put a processor and a model together.

    `special`: tokens of the tokenizer. `names`: attributes of the tokenizer that are tokens. `config`: keys of the
    config and the tokens whose ids they hold. `changes`: other keys, for the sizes of the processor.
    """

    template: str
    processor: Callable[[PreTrainedTokenizerFast, str], Any]
    special: tuple[str, ...]
    config: dict[str, str]
    names: dict[str, str] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    config_of: str = ""
    bos: str = "<s>"
    eos: str = "</s>"


def tokenizer_of(family: VlmFamily) -> PreTrainedTokenizerFast:
    basic = {"pad_token": "<pad>", "bos_token": family.bos, "eos_token": family.eos}
    return byte_tokenizer(basic, family.names, family.special)  # type: ignore[no-any-return]


def processor_of(name: str) -> Any:
    """Return the processor of a family."""
    family = VLM_FAMILIES[name]
    template = family.template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return family.processor(tokenizer_of(family), template or None)  # type: ignore[arg-type]


def model_of(name: str, processor: Any) -> Any:
    """Return the tiny random model of a family for a processor, in eval mode; equal for equal names."""
    family = VLM_FAMILIES[name]
    shape = FAMILIES[family.config_of or name]
    tokenizer = processor.tokenizer
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in family.config.items()}
    text = {
        **TEXT,
        **shape.text,
        "vocab_size": len(tokenizer) + 8,
        "max_position_embeddings": 4096,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **family.text,
    }
    config = AutoConfig.for_model(
        family.config_of or name,
        text_config=text,
        vision_config={**VISION, **(shape.vision or {}), **family.vision},
        tie_word_embeddings=False,
        **{**shape.config, **ids, **family.changes},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(config).float().eval()


def _qwen(image: str, video: str, name: str) -> Callable[[PreTrainedTokenizerFast, str], Any]:
    def make(tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
        import transformers

        sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
        limits = {"shortest_edge": 16 * 16, "longest_edge": 16 * 16 * 9}
        return getattr(transformers, name)(
            image_processor=getattr(transformers, image)(**sizes, size=dict(limits)),
            tokenizer=tokenizer,
            video_processor=getattr(transformers, video)(**sizes, size=dict(limits)),
            chat_template=template,
        )

    return make


def _gemma3(tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    pictures = Gemma3ImageProcessor(size={"height": 16, "width": 16}, do_pan_and_scan=False)
    return Gemma3Processor(pictures, tokenizer, chat_template=template, image_seq_length=4)


def _internvl(tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    size = {"height": 16, "width": 16}
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=1,
        chat_template=template,
    )


def _onevision(tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    size = {"height": 16, "width": 16}
    pinpoints = [[16, 16], [16, 32], [32, 16], [32, 32]]
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template,
    )


def _idefics3(tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    pictures = Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return Idefics3Processor(pictures, tokenizer, image_seq_len=1, chat_template=template)


def _smolvlm(tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    return SmolVLMProcessor(
        SmolVLMImageProcessor(**sizes),
        tokenizer,
        SmolVLMVideoProcessor(**sizes),
        image_seq_len=1,
        chat_template=template,
    )


def _pixtral(merge: int) -> Callable[[PreTrainedTokenizerFast, str], Any]:
    def make(tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
        from transformers import PixtralImageProcessor, PixtralProcessor

        pictures = PixtralImageProcessor(patch_size=8, size={"longest_edge": 32})
        return PixtralProcessor(pictures, tokenizer, patch_size=8, spatial_merge_size=merge, chat_template=template)

    return make


def _paligemma(tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    pictures = SiglipImageProcessor(size={"height": 16, "width": 16})
    pictures.image_seq_length = 4
    return PaliGemmaProcessor(pictures, tokenizer)


def _mllama(tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
    from transformers import MllamaImageProcessor, MllamaProcessor

    pictures = MllamaImageProcessor(size={"height": 16, "width": 16}, max_image_tiles=2)
    return MllamaProcessor(pictures, tokenizer, chat_template=template)


def _aya(tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
    from transformers import AyaVisionProcessor, GotOcr2ImageProcessor

    pictures = GotOcr2ImageProcessor(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=4)
    return AyaVisionProcessor(
        pictures, tokenizer, patch_size=8, img_size=16, downsample_factor=2, chat_template=template
    )


def _gemma4(tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
    from transformers import Gemma4AudioFeatureExtractor, Gemma4ImageProcessor, Gemma4Processor, Gemma4VideoProcessor

    sizes = {"patch_size": 8, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    return Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(**sizes),
        tokenizer,
        Gemma4VideoProcessor(**sizes),
        chat_template=template,
        image_seq_length=70,
    )


QWEN_CONFIG = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
QWEN_TEMPLATE = chatml("<|vision_start|><|image_pad|><|vision_end|>")


def qwen(name: str, image: str, video: str) -> VlmFamily:
    """Return one of Qwen's families."""
    return VlmFamily(
        QWEN_TEMPLATE,
        _qwen(image, video, name),
        (*CHATML, *QWEN_PICTURES),
        QWEN_CONFIG,
        bos="<|endoftext|>",
        eos="<|im_end|>",
    )


ROWS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3))
AYA_TILES = tuple(f"TILE_{number}" for number in range(1, 5))
VLM_FAMILIES: dict[str, VlmFamily] = {
    "qwen2_vl": qwen("Qwen2VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": qwen("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": qwen("Qwen3VLProcessor", "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor"),
    "qwen3_5": VlmFamily(
        QWEN_THINKS,
        _qwen("Qwen2VLImageProcessor", "Qwen3VLVideoProcessor", "Qwen3VLProcessor"),
        (*CHATML, *QWEN_PICTURES, "<think>", "</think>"),
        QWEN_CONFIG,
        bos="<|endoftext|>",
        eos="<|im_end|>",
    ),
    "gemma4": VlmFamily(
        turns(
            "<|image|>",
            "<|turn>{{ m.role }}\n",
            "<|turn>model\n",
            start="{{ bos_token }}",
            text="{{ part.text | trim }}",
            end="<turn|>\n",
        ),
        _gemma4,
        ("<|turn>", "<turn|>"),
        {
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
            "audio_token_id": "<|audio|>",
            "boi_token_id": "<|image>",
            "eoi_token_id": "<image|>",
        },
        {
            "image_token": "<|image|>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "video_token": "<|video|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
        },
        text={"vocab_size_per_layer_input": 512},
        bos="<bos>",
        eos="<eos>",
    ),
    "gemma3": VlmFamily(
        turns(
            "<start_of_image>",
            "<start_of_turn>{{ m.role }}\n",
            "<start_of_turn>model\n",
            start="{{ bos_token }}",
            text="{{ part.text | trim }}",
            end="<end_of_turn>\n",
        ),
        _gemma3,
        ("<start_of_turn>", "<end_of_turn>"),
        {
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        bos="<bos>",
        eos="<eos>",
    ),
    "internvl": VlmFamily(
        chatml("<IMG_CONTEXT>\n"),
        _internvl,
        CHATML,
        {"image_token_id": "<IMG_CONTEXT>"},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        bos="<|endoftext|>",
        eos="<|im_end|>",
    ),
    "llava_onevision": VlmFamily(
        chatml("<image>\n"),
        _onevision,
        (*CHATML, "<image>", "<video>"),
        {"image_token_id": "<image>", "image_token_index": "<image>", "video_token_id": "<video>"},
        changes={"image_grid_pinpoints": [[16, 16], [16, 32], [32, 16], [32, 32]]},
        bos="<|endoftext|>",
        eos="<|im_end|>",
    ),
    "idefics3": VlmFamily(
        IDEFICS.replace("BOS", "{{ bos_token }}"),
        _idefics3,
        ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *ROWS),
        {"image_token_id": "<image>"},
        bos="<|begin_of_text|>",
    ),
    "smolvlm": VlmFamily(
        IDEFICS.replace("BOS", "<|im_start|>"),
        _smolvlm,
        ("<|im_start|>", "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *ROWS),
        {"image_token_id": "<image>"},
        bos="<|im_start|>",
        eos="<end_of_utterance>",
    ),
    "mistral3": VlmFamily(
        MISTRAL,
        _pixtral(2),
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        {"image_token_index": "[IMG]"},
    ),
    "pixtral": VlmFamily(
        MISTRAL,
        _pixtral(1),
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        {"image_token_index": "[IMG]"},
        changes={"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        vision={"model_type": "pixtral", "head_dim": 6, "image_size": 32},
        config_of="llava",
    ),
    "paligemma": VlmFamily("", _paligemma, ("<image>",), {"image_token_index": "<image>"}, bos="<bos>", eos="<eos>"),
    "mllama": VlmFamily(
        turns(
            "<|image|>",
            "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            start="{{ bos_token }}",
            end="<|eot_id|>",
        ),
        _mllama,
        ("<|image|>", "<|python_tag|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        {"image_token_index": "<|image|>"},
        vision={"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "glm4v": VlmFamily(
        "[gMASK]<sop>{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{% generation %}"
        + parts("<|begin_of_image|><|image|><|end_of_image|>")
        + "{% endgeneration %}{% else %}<|{{ m.role }}|>\n"
        + parts("<|begin_of_image|><|image|><|end_of_image|>")
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        _qwen("Glm4vImageProcessor", "Glm4vVideoProcessor", "Glm4vProcessor"),
        (
            "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|image|>", "<|video|>",
            "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
        ),
        {
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
            "image_start_token_id": "<|begin_of_image|>",
            "image_end_token_id": "<|end_of_image|>",
            "video_start_token_id": "<|begin_of_video|>",
            "video_end_token_id": "<|end_of_video|>",
        },
        bos="<|bos|>",
        eos="<|endoftext|>",
    ),
    "aya_vision": VlmFamily(
        turns(
            "<image>",
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
            start="{{ bos_token }}",
            end="<|END_OF_TURN_TOKEN|>",
        ),
        _aya,
        (
            "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL", *AYA_TILES,
            "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
        ),
        {"image_token_index": "<|IMG_PATCH|>"},
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
    ),
}  # fmt: skip
