"""Put a vision tower, a projector and a causal language model together into a LLaVA in Hugging Face layout."""

from __future__ import annotations

from typing import Any

import torch

from milora_data.templates import render_chat_template

IMAGE_TOKEN = "<image>"


def compose(tower: Any, language: Any, tokenizer: Any, *, projector_seed: int = 0) -> Any:
    """Return a LlavaForConditionalGeneration of a tower and a causal language model, with a fresh two-layer projector.

    `<image>` is added to the tokenizer (in place) and to the embeddings. Tower features are used whole
    (`vision_feature_layer` -1, strategy `full`). The given models become parts of the new one.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    _add_image_row(language, len(tokenizer))
    config: Any = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=tower.config.grid**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(projector_seed)
        model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def processor_for(
    tokenizer: Any,
    *,
    image_size: int,
    grid: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    template: str = "vicuna_v1",
) -> Any:
    """Return the LlavaProcessor of a composed model: square padding, our prompt, grid² image tokens."""
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
        patch_size=image_size // grid,
        vision_feature_select_strategy="full",
        chat_template=render_chat_template(template, tokenizer),
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=0,
    )


def _add_image_row(language: Any, size: int) -> None:
    """Grow the embeddings to `size`; new rows are the mean of the old, so that no new token is ever the likeliest."""
    old = language.get_input_embeddings().weight
    mean = old.detach().float().mean(0).to(old.dtype)
    count = old.shape[0]
    if count >= size:
        return
    language.resize_token_embeddings(size, mean_resizing=False)
    embeddings = [language.get_input_embeddings(), language.get_output_embeddings()]
    with torch.no_grad():
        for embedding in embeddings:
            embedding.weight[count:] = mean
