"""A LLaVA in memory: composed of a tower, a projector and a language model; its config, processor and image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from milora_data.encode.templates import render_chat_template
from milora_data.pictures.pixels import Tiling
from milora_vl.common.errors import UserError
from milora_vl.models.timm_tower import register

IMAGE_TOKEN = "<image>"
# The vocabulary of composed models is padded to a multiple of this, as in Hugging Face's conversion of LLaVA.
ROWS = 64


@dataclass(frozen=True, slots=True)
class TowerPlan:
    """How LLaVA uses a tower: features of `layer`; strategy `default` drops the first token."""

    config: Any
    layer: int
    strategy: str
    tokens: int  # per image, after `strategy`
    extra_tokens: int  # class and register tokens of the tower
    image_size: int


def plan_tower(config: Any, *, layer: int, feature: str) -> TowerPlan:
    """Return which features of a tower LLaVA uses, and their number of tokens, counted on the meta device.

    `feature` is `patch`, which drops the class token if there is one, or `cls_patch`, which keeps it.
    """
    if config.model_type == "milora_timm_tower":
        return TowerPlan(config, -1, "full", config.grid**2, 0, config.image_size)
    total = count_tokens(config, layer)
    extra = total - (config.image_size // config.patch_size) ** 2
    strategy = "default" if extra and feature == "patch" else "full"
    return TowerPlan(config, layer, strategy, total - (strategy == "default"), extra, config.image_size)


def composed_config(text: Any, tower: Any, *, layer: int, feature: str) -> Any:
    """Return the config of a model composed of a language model and a tower, before it exists. Updates `text`."""
    plan, image_token = plan_tower(tower, layer=layer, feature=feature), text.vocab_size
    text.vocab_size = -(-(image_token + 1) // ROWS) * ROWS
    return llava_config(plan, text, image_token=image_token)


def llava_config(plan: Any, text: Any, *, image_token: int) -> Any:
    """Return HF's LlavaConfig of the parts; `plan` is a TowerPlan. Updates `text.tie_word_embeddings` in place."""
    from transformers import LlavaConfig

    text.tie_word_embeddings = bool(text.tie_word_embeddings) and _can_tie(text)
    config: Any = LlavaConfig(
        vision_config=plan.config,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=plan.tokens,
        vision_feature_layer=plan.layer,
        vision_feature_select_strategy=plan.strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return config


def _can_tie(text: Any) -> bool:
    from transformers import AutoModel

    with torch.device("meta"):
        return "embed_tokens" in dict(AutoModel.from_config(text).named_children())


def compose(
    tower: Any, language: Any, tokenizer: Any, *, plan: TowerPlan | None = None, rows: int = 1, projector_seed: int = 0
) -> Any:
    """Return a LlavaForConditionalGeneration of a tower and a causal language model, with a new two-layer projector.

    This adds `<image>` to the tokenizer (in place) and to the embeddings, and pads them to a multiple of `rows`.
    Without a `plan`, all features of a timm tower are used. The result shares the weights of `tower` and `language`,
    so composing a 7B model needs no extra memory.
    """
    from transformers import LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    register()
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    _add_image_row(language, -(-len(tokenizer) // rows) * rows)
    plan = plan_tower(tower.config, layer=-1, feature="patch") if plan is None else plan
    config = llava_config(plan, language.config, image_token=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(projector_seed)
        projector = LlavaMultiModalProjector(config)
        for layer in (projector.linear_1, projector.linear_2):
            torch.nn.init.normal_(layer.weight, std=0.02)  # the initialization of LLaVA in transformers
            torch.nn.init.zeros_(layer.bias)
    model.model.multi_modal_projector = projector.to(language.dtype)
    model.model.vision_tower = tower
    model.model.language_model = language.base_model
    model.lm_head = language.get_output_embeddings()
    if config.tie_word_embeddings:
        model.tie_weights()
    elif model.lm_head.weight is language.get_input_embeddings().weight:  # GPT-2: untie head and embeddings
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def processor_for(
    tokenizer: Any,
    *,
    image_size: int,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    template: str = "vicuna_v1",
    strategy: str = "full",
    extra_tokens: int = 0,
) -> Any:
    """Return the LlavaProcessor of a composed model: square padding, our template, one image token per feature."""
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor

    image_processor = LlavaImageProcessor(
        do_pad=True,
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(mean),
        image_std=list(std),
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        chat_template=render_chat_template(template, tokenizer),
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=extra_tokens,
    )


def _add_image_row(language: Any, size: int) -> None:
    """Grow embeddings and head to `size`; new rows are the mean of the old rows, so a new token is never the argmax."""

    count = len(language.get_input_embeddings().weight)
    if count >= size:
        return
    language.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for layer in (language.get_input_embeddings(), language.get_output_embeddings()):
            layer.weight[count:] = layer.weight[:count].float().mean(0).to(layer.weight.dtype)


LLAVAS = ("llava", "llava_next")
# Common towers; the tokens of others are counted on the meta device.
EXTRA_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "milora_timm_tower": 0}


def is_llava(config: Any) -> bool:
    """Return whether the model is a LLaVA-1.5 or LLaVA-1.6, whose pictures take a number of tokens known here.

    Pixtral has the same model type, but the size of a picture decides how many tokens it takes.
    """
    return config.model_type in LLAVAS and config.vision_config.model_type != "pixtral"


def uses_processor(config: Any) -> bool:
    return "vision_config" in config.to_dict() and not is_llava(config)


def tiling_of(config: Any) -> Tiling | None:
    """Return how a LLaVA-1.6 model tiles images; None for models without tiles."""
    if config.model_type != "llava_next":
        return None
    vision = config.vision_config
    pinpoints = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
    return Tiling(pinpoints, vision.image_size, vision.image_size // vision.patch_size)


def image_token_id(config: Any) -> int:
    return int(config.image_token_id)


def image_tokens(config: Any) -> int:
    """Return the number of tokens of an image, from the sizes of the tower; with tiles: of 640 x 480 pixels.

    The model must be a LLaVA (`is_llava`).
    """
    tiling = tiling_of(config)
    if tiling is not None:
        return tiling.num_tokens(480, 640)
    dropped = config.vision_feature_select_strategy == "default"
    return _patches(config) + extra_tokens(config) - int(dropped)


def extra_tokens(config: Any) -> int:
    """Return the number of class and register tokens of the tower of a LLaVA."""
    vision = config.vision_config
    if vision.model_type in EXTRA_TOKENS or config.model_type != "llava":
        return EXTRA_TOKENS.get(vision.model_type, 0)
    return count_tokens(vision, layers_of(config)[0]) - _patches(config)


def layers_of(config: Any) -> list[int]:
    """Return the layers of the tower whose features the projector reads: one, or several that are joined."""
    layers = config.to_dict().get("vision_feature_layer", -1)
    return [layers] if isinstance(layers, int) else list(layers)


def _patches(config: Any) -> int:
    vision = config.vision_config
    side = vision.image_size // vision.patch_size if "patch_size" in dir(vision) else vision.grid
    return int(side * side)


def count_tokens(config: Any, layer: int) -> int:
    """Return the number of tokens that a layer of a tower outputs per image, before any is dropped."""
    from transformers import AutoModel
    from transformers.modeling_utils import set_zero3_state

    with torch.device("meta"), set_zero3_state():  # ZeRO-3 must not shard this model
        tower = AutoModel.from_config(config)
        try:
            out = tower(torch.empty(1, 3, config.image_size, config.image_size), output_hidden_states=True)
            _, tokens, _ = out.hidden_states[layer].shape
        except (TypeError, AttributeError, IndexError, ValueError) as error:
            raise UserError(
                f"{config.model_type} is not usable as a vision tower with layer {layer}: {error}",
                hint="expected:  an encoder with hidden states (batch, tokens, channels), or timm/NAME",
            ) from None
    return int(tokens)


def complete_processor(processor: Any, config: Any) -> None:
    """Set the fields that the processor needs to count image tokens, and square padding as in LLaVA-1.5."""
    if not is_llava(config):
        return
    processor.patch_size = config.vision_config.patch_size
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    processor.num_additional_image_tokens = extra_tokens(config)
    if config.model_type == "llava_next":
        processor.image_processor.image_grid_pinpoints = config.image_grid_pinpoints
    elif type(processor.image_processor).__name__.startswith("LlavaImageProcessor"):  # ...Fast, ...Pil
        processor.image_processor.do_pad = True
