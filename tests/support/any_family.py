"""A tiny random model and a processor of any family that transformers registers, without the hub.

`tiny_config` shrinks the default config of a family by the names of its numbers; `tiny_processor` builds the family's
own processor classes around a byte-level tokenizer. `ROWS` has what these rules do not find out.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

LAYERS, HEADS, IMAGE, PATCH = 2, 2, 64, 8
TEXT_WIDTH, VISION_WIDTH, HEAD = 64, 48, 32
# The first pattern that matches the name of a number gives its value: in the part of the pictures, and elsewhere.
NUMBERS: tuple[tuple[str, int, int], ...] = (
    (r"(out|text|output|word_embed)_(hidden_size|dim|proj_dim)|projector_output_dim|vision_output_dim|adapter_out_dim|output_proj_dims|adapter_input_size|mm_embed_dim",
     TEXT_WIDTH, TEXT_WIDTH),
    (r"encoder_hidden_size|vision_hidden_size|adapter_in_dim|patch_embed_hidden_size", VISION_WIDTH, VISION_WIDTH),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|index_head_dim|rotary_dim", 16, 16),
    (r"(q|kv)_lora_rank|laurel_rank|hc_lowrank|loop_gate_rank|resampler_(head_dim|dim_head)|d_rel", 16, 16),
    (r"linear_((key|value)_)?head_dim|mamba_head_dim|ssm_state_size", 16, 16),
    (r"(.*_)?head_dim|d_kv", VISION_WIDTH // HEADS, HEAD),
    (r".*_per_layer_input", 16, 16),
    (r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_dim|d_ff|mlp_dim|share_expert_dim", 40, 56),
    (r"(.*_)?(hidden_size|hidden_dim|d_model|embed_dim|n_embd|projection_dim)", VISION_WIDTH, TEXT_WIDTH),
    (r"(.*_)?(num_(key_value_|attention_|key_|value_)?heads|(attention|n|index_n|resampler_n)_heads?|resampler_heads)",
     HEADS, HEADS),
    (r"(num_)?(hidden_|global_|encoder_|decoder_)?layers|n_layers?|(resampler_)?depth", LAYERS, LAYERS),
    (r"num_experts_per_tok|moe_topk|moe_k", 2, 2),
    (r"(moe_)?(num_experts|num_local_experts|n_routed_experts)", 4, 4),
    (r"n_group|topk_group", 1, 1),
    (r"image_size|max_image_size|resolution", IMAGE, IMAGE),
    (r"patch_size", PATCH, PATCH),
    (r"output_channels|latent_channels|base_channels|num_pos_feats", 32, 32),
    (r"num_(position_)?embeddings|num_patches|codebook_size", (IMAGE // PATCH) ** 2, (IMAGE // PATCH) ** 2),
    (r"(num_query_tokens|latent_query_num|resampler_n(um)?_latents)", 4, 4),
    (r"window_size", 4, 4),
    (r"sliding_window(_size)?|attention_chunk_size", 64, 64),
    (r"max_position_embeddings|max_source_positions|seq_len|max_num_patches", 4096, 4096),
)  # fmt: skip
_PICTURES = re.compile(r"vision|visual|image|vq_config|sam_config|qformer|perceiver")


# Tokens that every tokenizer has; CHATML's turns are in the template of every family.
TURN, END = "<|im_start|>", "<|im_end|>"
BASIC = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": END}


@dataclass(frozen=True)
class Row:
    """What the rules do not find out about a family.

    `config`: fields of its config by path; a text that is a special token is its id. `processor`, `pictures`:
    arguments of its processor and its image processor. `like`: the family whose processor classes it takes, if none is
    registered for it. `picture`: what a chat template writes for a picture, if not the processor's token alone.
    """

    config: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Any] = field(default_factory=dict)
    like: str = ""
    kind: str = ""
    picture: str = ""
    tokens: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def _rope(*sections: int, **others: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **others}


GLM = {"text_config.rope_parameters": _rope(4, 6, 6)}
WINDOWS = {"vision_config.window_size": 4 * PATCH}
CLS = {"num_additional_image_tokens": 1}
OVIS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
ROWS: dict[str, Row] = {
    "llama4": Row(
        {
            "vision_config.intermediate_size": 4 * VISION_WIDTH,
            "vision_config.projector_input_dim": TEXT_WIDTH,
            "image_token_index": lambda tokens: tokens.get("<|patch|>", 0),
        }
    ),
    "inkling_mm_model": Row(pictures={"size": {"height": PATCH, "width": PATCH}}),
    "inkling2_loop": Row(pictures={"size": {"height": 2 * PATCH, "width": 2 * PATCH}}),
    "inkling2": Row(pictures={"size": {"height": 2 * PATCH, "width": 2 * PATCH}}),
    "video_llava": Row(
        processor=CLS | {"patch_size": PATCH},
        pictures={"size": {"shortest_edge": IMAGE}, "crop_size": {"height": IMAGE, "width": IMAGE}},
    ),
    "gemma4_unified": Row(names=("audio", "boa", "eoa")),
    "gemma4": Row(names=("audio", "boa", "eoa")),
    "apertus1p5": Row({"audio_config.codebook_dim": TEXT_WIDTH}),
    "aria": Row(
        {"projector_patch_to_query_dict": {49: 16}, "vision_config.image_size": 490, "vision_config.patch_size": 70},
        {"size_conversion": {490: 16}},
        {"max_image_size": 490},
    ),
    "aya_vision": Row(processor={"img_size": IMAGE}),
    "chameleon": Row(
        {"vocabulary_map": dict, "vq_config.channel_multiplier": [1, 1, 1, 1]},
        {"image_seq_length": 64},
        tokens=tuple(f"IMGIMG{chr(65 + i // 8)}{chr(65 + i % 8)}Z" for i in range(64)),
    ),
    "cohere2_vision": Row(pictures={"patch_size": 4}),
    "cohere_compass": Row(
        {"text_config.rope_parameters": {"full_attention": DEFAULT_ROPE, "sliding_attention": DEFAULT_ROPE}}
    ),
    "cosmos3_edge": Row(GLM),
    "cosmos3_omni": Row(GLM, like="qwen3_vl"),
    "deepseek_ocr2": Row(
        {
            "text_config.num_experts_per_tok": 2,
            "text_config.mlp_layer_types": ["dense", "sparse"],
            "vision_config.sam_config": {
                "downsample_channels": [32, VISION_WIDTH],
                "image_size": 1024,
                "patch_size": 16,
            },
        },
        pictures={"size": {"height": 1024, "width": 1024}, "tile_size": 768},
    ),
    "deepseek_vl": Row(processor={"num_image_tokens": 64}),
    "deepseek_vl_hybrid": Row(
        {"high_res_vision_config.image_size": 128},
        {"num_image_tokens": 64},
        {"high_res_size": {"height": 128, "width": 128}},
    ),
    "diffusion_gemma": Row(
        {"text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 24},
        like="gemma4",
        names=("audio", "boa", "eoa"),
    ),
    "emu3": Row(
        {"vocabulary_map": dict, "vq_config.channel_multiplier": [1, 1, 1, 1], "vq_config.hidden_size": 32},
        pictures={"min_pixels": IMAGE**2, "max_pixels": IMAGE**2},
        tokens=("<|extra_200|>", *(f"<|visual token {i:06}|>" for i in range(64))),
    ),
    "ernie4_5_vl_moe": Row(
        {"text_config.rope_parameters": _rope(6, 6, 4), "text_config.moe_intermediate_size": [40, 24]}
    ),
    "exaone4_5": Row(WINDOWS),
    "fast_vlm": Row({"vision_config.hidden_size": 2048}, {"patch_size": 32}, like="llava"),
    "fuyu": Row(tokens=("|SPEAKER|", "|NEWLINE|")),
    "gemma3": Row({"mm_tokens_per_image": 16}, {"image_seq_length": 16}),
    "gemma3n": Row(
        {
            "text_config.num_kv_shared_layers": 0,
            "vision_soft_tokens_per_image": 4,
            "vision_config.hidden_size": 2048,
            "vision_config.architecture": "resnet26",
        },
        {"image_seq_length": 4},
        names=("image", "audio", "boi", "eoi", "boa", "eoa"),
    ),
    "glm46v": Row(GLM),
    "glm4v": Row(GLM),
    "glm4v_moe": Row({"text_config.rope_parameters": _rope(2, 3, 3, partial_rotary_factor=0.5)}, like="glm4v"),
    "glm_ocr": Row(GLM, like="glm46v"),
    "glmga": Row(GLM, like="glm46v"),
    "granite4_vision": Row(
        {
            "downsample_rate": "2/4",
            "deepstack_layer_map": [[-1, 0]],
            "spatial_target_layers": [1],
            "vision_config.hidden_size": 64,
            "qformer_config.hidden_size": 64,
            "qformer_config.encoder_hidden_size": 64,
        },
        CLS,
    ),
    "granite_docling": Row(processor={"image_seq_len": 4}),
    "hunyuan_vl": Row(
        {"text_config.head_dim": HEAD, "text_config.rope_parameters": _rope(4, 4, 4, 4)},
        picture="<image_start><image><image_end>",
    ),
    "hy_v4_vl": Row({"text_config.rope_parameters": _rope(2, 3, 3)}),
    "hyperclovax_vision_v2": Row(WINDOWS),
    "idefics2": Row(processor={"image_seq_len": 4}),
    "idefics3": Row(processor={"image_seq_len": 16}),
    "internvl": Row(processor={"image_seq_length": 16}),
    "janus": Row(
        {"vision_config.projection_dim": TEXT_WIDTH, "vq_config.projection_dim": TEXT_WIDTH}, {"num_image_tokens": 64}
    ),
    "kimi_k25": Row({"projection_hidden_size": VISION_WIDTH, "text_config.head_dim": 16}),
    "kosmos-2": Row(kind="Kosmos2Processor"),
    "kosmos-2.5": Row({"vision_config.patch_embed_hidden_size": 768}, kind="Kosmos2_5Processor"),
    "llava": Row(processor=CLS),
    "llava_next": Row(processor=CLS),
    "llava_next_video": Row(processor=CLS),
    "llava_onevision": Row(processor={"num_image_tokens": 64}),
    "mllama": Row({"vision_config.vision_output_dim": 2 * VISION_WIDTH, "text_config.cross_attention_layers": [1]}),
    "molmo2": Row(
        {
            "adapter_config.vision_feature_layer": [1, 0],
            "adapter_config.hidden_size": VISION_WIDTH,
            "adapter_config.head_dim": VISION_WIDTH // HEADS,
            "image_patch_id": lambda tokens: tokens.get("<im_patch>", 0),
        },
        pictures={"overlap_margins": [1, 1]},
        tokens=("<im_patch>", "<im_col>", "<im_start>", "<im_end>", "<low_res_im_start>"),
    ),
    "muse_glimmer": Row({"out_hidden_size": 4 * VISION_WIDTH}),
    "muse_spark": Row({"out_hidden_size": 4 * VISION_WIDTH, "audio_config.num_hidden_layers": 4}),
    "nemotron_h_omni": Row({"vision_config.video_temporal_patch_size": 2}),
    "ovis2": Row(
        {
            "image_token_id": lambda tokens: tokens.get("<IMG_ATOM>", 0),
            "visual_indicator_token_ids": lambda tokens: [tokens.get(name, 0) for name in OVIS],
        },
        {"image_seq_length": 64},
        tokens=("<IMG_ATOM>", *OVIS),
    ),
    "paddleocr_vl": Row(GLM),
    "paligemma": Row(pictures={"image_seq_length": 64}),
    "perception_lm": Row(
        {
            "vision_config.architecture": "vit_pe_core_large_patch14_336",
            "vision_config.model_args": {
                "embed_dim": 64,
                "img_size": (56, 56),
                "depth": 2,
                "global_pool": "",
                "init_values": 0.1,
                "use_post_transformer_norm": False,
                "ref_feat_shape": (1, 1),
            },
        },
        {"patch_size": 14, "pooling_ratio": 1},
        {"size": {"height": 56, "width": 56}, "tile_size": 56},
    ),
    "qianfan_ocr": Row(processor={"image_seq_length": 16}, picture="<image>"),
    "qwen2_5_omni_thinker": Row(
        GLM | WINDOWS | {"vision_start_token_id": lambda tokens: tokens.get("<vision_start>", 0)},
        like="qwen2_5_omni",
        tokens=("<vision_start>",),
    ),
    "qwen2_5_vl": Row(GLM | WINDOWS),
    "qwen2_vl": Row(GLM | {"vision_config.hidden_size": TEXT_WIDTH}),
    "qwen3_5": Row({"text_config.rope_parameters": _rope(2, 1, 1, partial_rotary_factor=0.25)}),
    "qwen3_5_moe": Row({"text_config.rope_parameters": _rope(2, 1, 1, partial_rotary_factor=0.25)}),
    "qwen3_omni_moe_thinker": Row(
        GLM | {"vision_start_token_id": lambda tokens: tokens.get("<vision_start>", 0)},
        like="qwen3_omni_moe",
        tokens=("<vision_start>",),
    ),
    "qwen3_vl": Row(GLM),
    "qwen3_vl_moe": Row(GLM, like="qwen3_vl"),
    "qwen4_exp": Row(
        {
            "text_config.indexer_compress_ratio": 4,
            "text_config.indexer_budget": 64,
            "text_config.indexer_n_heads": 2,
            "text_config.indexer_kv_heads": 1,
            "text_config.indexer_head_dim": 32,
        }
    ),
    "shieldgemma2": Row({"mm_tokens_per_image": 16}, {"image_seq_length": 16}),
    "smolvlm": Row(processor={"image_seq_len": 16}),
    "step3p7": Row({"text_config.sliding_window": 64}, pictures={"patch_size": IMAGE, "max_image_size": IMAGE}),
    "t5gemma2": Row({"encoder.mm_tokens_per_image": 16}, {"image_seq_length": 16}),
    "unlimited_ocr": Row({"vision_config.sam_config.downsample_channels": [32, VISION_WIDTH]}, {"patch_size": PATCH}),
    "vipllava": Row({"vision_feature_layers": [-2, -1]}),
}


def tiny_family(model_type: str) -> tuple[Any, Any]:
    """Return the tiny config of a family, and its processor, or None if no processor is registered."""
    row = ROWS.get(model_type, Row())
    default = AutoConfig.for_model(model_type)
    names = dict.fromkeys(_token_names(default))
    config = _tiny(default, row, BASIC_IDS, 512, {})
    processor = tiny_processor(config, row, {f"<{name}>" for name in names} | set(row.tokens))
    if processor is None:
        return config, None
    tokenizer = processor.tokenizer
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in BASIC.items()}
    ids = {f"{key}_id": value for key, value in ids.items()} | _ids(processor, names)
    return _tiny(default, row, ids, len(tokenizer) + 8, tokenizer.get_vocab()), processor


BASIC_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _token_names(config: PreTrainedConfig) -> list[str]:
    """Return the fields `image_token_id`, `video_token_index`, ... of a config by their first words."""
    names = []
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            names += _token_names(value)
        elif match := re.fullmatch(r"(.+)_token_(id|index)", key):
            names.append(match[1])
    return [
        name for name in names if not re.fullmatch("_?(pad|bos|eos|sep|mask|cls|unk|forced_.*|decoder_start)", name)
    ]


def _ids(processor: Any, names: Iterable[str]) -> dict[str, int]:
    """Return the ids of the special tokens of a config, as the processor writes them."""
    ids = {}
    for name in names:
        value = getattr(processor.tokenizer, f"{name}_token_id", getattr(processor, f"{name}_token_id", None))
        if not isinstance(value, int):
            token = getattr(processor, f"{name}_token", None)
            token = token if isinstance(token, str) else f"<{name}>"
            value = processor.tokenizer.convert_tokens_to_ids(token)
        ids |= {f"{name}_token_id": value, f"{name}_token_index": value}
    return ids


def byte_tokenizer(basic: Mapping[str, str], tokens: Mapping[str, str], others: Iterable[str]) -> Any:
    """Return a byte-level tokenizer: `basic` and `tokens` name attributes; `others` are special tokens too."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = dict.fromkeys((*basic.values(), *others, *tokens.values()))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **basic, extra_special_tokens=dict(tokens))


def tiny_processor(config: Any, row: Row, others: set[str]) -> Any:
    """Return the processor of a family for small pictures. It gets the special tokens that it asks for."""
    from transformers import PROCESSOR_MAPPING

    registered = AutoConfig.for_model(row.like) if row.like else config
    kind = getattr(transformers, row.kind) if row.kind else PROCESSOR_MAPPING.get(type(registered), None)
    if kind is None:
        return None
    tokens = {f"{name}_token": f"<{name}>" for name in row.names}
    for _ in range(20):
        parts = {
            name: _part(name, config, registered, row, byte_tokenizer(BASIC, tokens, (TURN, *others)))
            for name in kind.get_attributes()
        }
        options = _arguments(kind.__init__, config) | row.processor
        try:
            processor = kind(**parts, **options)
        except (AttributeError, ValueError) as error:
            missing = re.search(r"attribute '?(\w+_token)(_id)?\b", str(error))
            if missing is None or missing[1] in tokens:
                raise
            tokens[missing[1]] = f"<{missing[1].removesuffix('_token')}>"
            continue
        vocabulary = processor.tokenizer.get_vocab()
        written = {value for name, value in vars(processor).items() if isinstance(value, str) and "token" in name}
        written |= {TURN, *re.findall(r"<[^<> ]+>", row.picture)}
        if written <= set(vocabulary) | set(tokens.values()):
            break
        others |= written - set(vocabulary)
    for name in set(processor.images_kwargs if "images_kwargs" in dir(processor) else ()) & set(row.pictures):
        processor.images_kwargs = {**processor.images_kwargs, name: row.pictures[name]}
    if "image_token" in dir(processor) and "suffix" not in inspect.signature(kind.__call__).parameters:
        processor.chat_template = chat_template(row.picture or str(processor.image_token))
    return processor


def chat_template(picture: str) -> str:
    """Return ChatML with a placeholder for pictures."""
    parts = (
        "{% for p in m.content %}{% if p.type == 'image' %}"
        + picture
        + "{% elif 'text' in p %}{{ p.text }}{% endif %}{% endfor %}"
    )
    return (
        "{% for m in messages %}" + TURN + "{{ m.role }}\n" + parts + END + "\n{% endfor %}"
        "{% if add_generation_prompt %}" + TURN + "assistant\n{% endif %}"
    )


def _part(name: str, config: Any, registered: Any, row: Row, tokenizer: Any) -> Any:
    """Return one part of a processor: its tokenizer, or what prepares pictures, videos or sounds."""
    from transformers import FEATURE_EXTRACTOR_MAPPING, IMAGE_PROCESSOR_MAPPING, VIDEO_PROCESSOR_MAPPING

    if "tokenizer" in name:
        return tokenizer
    mapping = {"image_processor": IMAGE_PROCESSOR_MAPPING, "video_processor": VIDEO_PROCESSOR_MAPPING}
    kind = mapping.get(name, FEATURE_EXTRACTOR_MAPPING)[type(registered)]
    if isinstance(kind, dict):
        kind = next(iter(part for key, part in sorted(kind.items(), reverse=True) if part is not None))
    if isinstance(kind, str):
        import transformers

        kind = getattr(transformers, kind)
    if name not in mapping:
        return kind()
    return kind(**(_picture_sizes(kind, config) | (row.pictures if name == "image_processor" else {})))


def _picture_sizes(kind: Any, config: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in dir(kind):
        usual = inspect.getattr_static(kind, name)
        if name in ("size", "crop_size", "max_image_size") and isinstance(usual, Mapping):
            values[name] = _small_size(usual)
        elif name in ("min_pixels", "max_pixels") and isinstance(usual, int):
            values[name] = (2 * PATCH) ** 2 if name == "min_pixels" else IMAGE**2
        elif isinstance(usual, (int, list, tuple)) and not isinstance(usual, bool) and not name.startswith("_"):
            found = _of_config(config, SAME.get(name, name))
            if found is not None and name not in ("image_mean", "image_std", "resample", "rescale_factor"):
                values[name] = found
    return values


# Numbers of an image processor that a config has under another name.
SAME = {
    "merge_size": "spatial_merge_size",
    "vision_patch_size": "patch_size",
    "tile_size": "image_size",
    "encoder_patch_size": "patch_size",
    "max_image_tiles": "max_num_tiles",
}


def _small_size(usual: Mapping[str, int]) -> dict[str, int]:
    if (usual.get("longest_edge") or 0) > 2**16:  # limits of the whole picture
        return {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": IMAGE**2}
    return dict.fromkeys(usual, IMAGE)


def _arguments(init: Any, config: Any) -> dict[str, Any]:
    """Return the arguments of a processor that its model's config also has."""
    values = {name: _of_config(config, name) for name in inspect.signature(init).parameters}
    return {name: value for name, value in values.items() if value is not None}


def _of_config(config: Any, name: str) -> Any:
    """Return a number or word of a config, or of the parts of it; None without one."""
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    values = [
        vars(part).get(name)
        for part in (parts[0], *sorted(parts[1:], key=lambda part: "Vision" not in type(part).__name__))
    ]
    return next((value for value in values if isinstance(value, (int, str, list, tuple))), None)


def _tiny(default: Any, row: Row, ids: Mapping[str, int], vocabulary: int, tokens: Mapping[str, int]) -> Any:
    """Return a config with small numbers. `ids` and `tokens` have the values of the fields with ids and with tokens."""
    values = _shrunk(default, ids, vocabulary, is_vision=False)
    for path, value in row.config.items():
        *parents, name = path.split(".")
        part = values
        for parent in parents:
            part = part.setdefault(parent, {})
        value = value(tokens) if callable(value) else value
        part[name] = {**part[name], **value} if name.endswith("sam_config") else value
    return AutoConfig.for_model(default.model_type, **values)


def _shrunk(config: PreTrainedConfig, ids: Mapping[str, int], vocabulary: int, *, is_vision: bool) -> dict[str, Any]:
    values: dict[str, Any] = {}
    kept = _layers_kept(config)
    parts = {
        name: kind() for name, kind in config.sub_configs.items() if name == "vision_config" and kind is not AutoConfig
    }
    known = {name: value for name, value in vars(config).items() if value is not None or name in ids}
    for name, value in (parts | known).items():
        if isinstance(value, PreTrainedConfig):
            inside = _shrunk(value, ids, vocabulary, is_vision=bool(is_vision or _PICTURES.search(name)))
            values[name] = {"model_type": value.model_type, **inside}
        elif name in ids:
            values[name] = ids[name]
        elif name == "image_grid_pinpoints":
            values[name] = [[IMAGE, IMAGE], [IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]]
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            small = (
                vocabulary
                if re.fullmatch(r"(unpadded_)?vocab_size(_per_layer_input)?", name)
                else _small(name, is_vision)
            )
            if small is not None:
                values[name] = len(kept) if small == LAYERS and kept and name == "num_hidden_layers" else small
        elif isinstance(value, (list, tuple)) and kept and len(value) == config.num_hidden_layers:
            values[name] = [value[layer] for layer in kept]
        elif isinstance(value, (list, tuple)) and value and all(type(part) is int for part in value):
            small = _small(name, is_vision)
            if small is not None:
                values[name] = [small] * len(value)
            elif re.search(r"ind(ex|ic)es|_layers$", name):
                values[name] = [0]
    return values


def _small(name: str, is_vision: bool) -> int | None:
    for pattern, vision, text in NUMBERS:
        if re.fullmatch(pattern, name):
            return vision if is_vision else text
    return None


def _layers_kept(config: PreTrainedConfig) -> list[int]:
    """Return the first layer of each kind, from the lists of the config that have an entry for each layer."""
    count = getattr(config, "num_hidden_layers", None)
    kept: set[int] = set()
    for value in vars(config).values():
        if isinstance(value, (list, tuple)) and len(value) == count and all(isinstance(kind, str) for kind in value):
            kept |= {value.index(kind) for kind in value}
    first = next((layer for layer in range(count or 0) if layer not in kept), None)
    return sorted(kept | {first}) if len(kept) == 1 and first is not None else sorted(kept)


def tiny_model(config: Any, seed: int = 0) -> nn.Module:
    """Return the model of a config with random float32 weights, in eval mode."""
    from transformers import AutoModelForImageTextToText

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config).float().eval()
