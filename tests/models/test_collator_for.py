"""`collator_for`: one call for every family that `train` takes, and clear errors for the other way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPImageProcessor

from milora_data import ImageTextCollator
from milora_vl import collator_for
from milora_vl.models.tiny import tiny_llama, tiny_llava
from support.problems import raises_code
from support.tiny_next import tiny_next
from support.versions import needs_spans
from support.vlm_families import model_of, processor_of
from support.vlm_runs import record

ASKED = record([("human", "<image>\nWhat is it?"), ("gpt", "A cat.")], ["0.png"])


@pytest.mark.parametrize("make", [tiny_llava, tiny_next])
def test_the_pictures_of_llava_take_the_tokens_of_the_model(make: Any, pictures: Path) -> None:
    model, processor = make()
    collate = collator_for(model, processor, image_folder=pictures)
    assert model(**collate([ASKED])).loss > 0


def test_a_text_model_gets_no_pictures(tiny_records: list[dict[str, Any]]) -> None:
    model, tokenizer = tiny_llama()
    text = [value for value in tiny_records if "image" not in value]
    assert model(**collator_for(model, tokenizer)(text)).loss > 0
    with raises_code("model-reads-only-text"):
        collator_for(model, tokenizer)(tiny_records[:1])


@needs_spans
@pytest.mark.parametrize("option", [{"template": "vicuna_v1"}, {"image_aspect_ratio": "anyres"}])
def test_what_the_models_own_processor_decides_is_no_option(option: dict[str, Any]) -> None:
    processor = processor_of("qwen2_5_vl")
    with raises_code("collate-unsupported-layout", where=next(iter(option))):
        collator_for(model_of("qwen2_5_vl", processor), processor, **option)


def test_a_processor_in_place_of_a_tokenizer_and_missing_image_tokens_name_the_right_call() -> None:
    _, processor = tiny_llava()
    with raises_code("collate-no-tokenizer", hint="collator_for(model, processor)"):
        ImageTextCollator(processor)
    with raises_code("collate-image-tokens", where="image_tokens", hint="collator_for(model, processor)"):
        ImageTextCollator(processor.tokenizer, processor.image_processor)
    like_llava = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    assert ImageTextCollator(processor.tokenizer, like_llava).image_tokens == 576
