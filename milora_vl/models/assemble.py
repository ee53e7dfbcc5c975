"""A vision tower, a projector and a causal language model put together into a LLaVA in Hugging Face's layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from milora_data.templates import render_chat_template
from milora_vl.models.image_tokens import count_tokens

IMAGE_TOKEN = "<image>"


@contextmanager
def whole_weights() -> Iterator[None]:
    """While inside, transformers loads and makes models as if there were no ZeRO-3; what is read then has all parts."""
    from transformers.integrations import deepspeed

    told = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = told


@dataclass(frozen=True, slots=True)
class TowerPlan:
    """A tower as LLaVA uses it: features of `layer`, the first token dropped where `strategy` is default."""

    config: Any
    layer: int
    strategy: str
    tokens: int  # of a picture, after the choice above
    extra_tokens: int  # of the tower beside its patches: class token, registers
    image_size: int


def plan_tower(config: Any, *, layer: int, feature: str) -> TowerPlan:
    """Say which features of a tower are used, and how many tokens they are, counted by the tower on the meta device.

    `feature` is LLaVA's: patch drops the class token where there is one, cls_patch keeps it.
    """
    if config.model_type == "milora_timm_tower":
        return TowerPlan(config, -1, "full", config.grid**2, 0, config.image_size)
    found = count_tokens(config, layer)
    extra = found - (config.image_size // config.patch_size) ** 2
    strategy = "default" if extra and feature == "patch" else "full"
    return TowerPlan(config, layer, strategy, found - (strategy == "default"), extra, config.image_size)


def llava_config(plan: Any, text: Any, *, image_token: int) -> Any:
    """HF's LlavaConfig of the parts; `plan` is a TowerPlan. Says in `text` too whether its head stays tied."""
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
    """HF's LLaVA ties its head to `embed_tokens` of the language model by name; GPT-2 and others call it otherwise."""
    from transformers import AutoModel

    with torch.device("meta"):
        return "embed_tokens" in dict(AutoModel.from_config(text).named_children())


def compose(
    tower: Any,
    language: Any,
    tokenizer: Any,
    *,
    plan: TowerPlan | None = None,
    rows: int = 1,
    projector_seed: int = 0,
) -> Any:
    """Return a LlavaForConditionalGeneration of a tower and a causal language model, with a fresh two-layer projector.

    `<image>` is added to the tokenizer (in place) and to the embeddings, whose rows become a multiple of `rows`.
    Without a `plan`, the features of a timm tower are used whole. The given models become parts of the new one, which
    holds nothing else: a model of 7B is composed in the memory that its parts take.
    """
    from transformers import LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

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
            torch.nn.init.normal_(layer.weight, std=0.02)  # as transformers starts a LLaVA
            torch.nn.init.zeros_(layer.bias)
    model.model.multi_modal_projector = projector.to(language.dtype)
    model.model.vision_tower = tower
    model.model.language_model = language.base_model
    model.lm_head = language.get_output_embeddings()
    if config.tie_word_embeddings:
        model.tie_weights()
    elif model.lm_head.weight is language.get_input_embeddings().weight:  # GPT-2's: the two go apart
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
    """Return the LlavaProcessor of a composed model: square padding, our prompt, as many image tokens as features."""
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
    """Grow embeddings and head to `size`; new rows of each are the mean of its old ones.

    So no new token is ever the likeliest.
    """

    count = len(language.get_input_embeddings().weight)
    if count >= size:
        return
    language.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for layer in (language.get_input_embeddings(), language.get_output_embeddings()):
            layer.weight[count:] = layer.weight[:count].float().mean(0).to(layer.weight.dtype)
