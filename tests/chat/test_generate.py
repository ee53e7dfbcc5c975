"""Generated answers do not depend on the batch: not on its size, its padding, or on what its rows share."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from milora_data.encode.labels import encode_prompt
from milora_data.records.record import Turn
from milora_vl.models.generate import Prompt, Reply, generate
from milora_vl.models.llava import image_token_id, image_tokens

Made = tuple[Any, Any]


def lively(model: Any) -> Any:
    """Scale random weights up until the answers depend on question and picture."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


def questions(count: int, pictures: bool) -> list[Prompt]:
    rng = random.Random(0)
    images = [Image.new("RGB", (rng.randint(20, 60), rng.randint(20, 60)), tuple(rng.randbytes(3))) for _ in range(4)]
    prompts = []
    for i in range(count):
        text = "What " + "".join(rng.choices("abc ", k=rng.randint(0, 30))) + "?"
        if not pictures or i % 7 == 6:
            prompts.append(Prompt((Turn("user", text),)))
        elif i % 7 == 5:
            turns = (Turn("user", f"<image>\n{text}"), Turn("assistant", "yes"), Turn("user", "Why?"))
            prompts.append(Prompt(turns, (images[i % 4],)))
        else:
            prompts.append(Prompt((Turn("user", f"<image>\n{text}"),), (images[i % 4],)))
    return prompts


@pytest.fixture(scope="module")
def llava(tiny_llava: Callable[..., Made]) -> Made:
    model, processor = tiny_llava()
    return lively(model), processor


@pytest.fixture(scope="module")
def one_by_one(llava: Made) -> list[Reply]:
    return generate(*llava, questions(14, True), batch_size=1, max_new_tokens=12)


@pytest.mark.parametrize("share_pictures", [True, False])
@pytest.mark.parametrize("batch_size", [2, 5, 16])
def test_batches_give_the_answers_of_batch_one(
    llava: Made, one_by_one: list[Reply], batch_size: int, share_pictures: bool
) -> None:
    got = generate(*llava, questions(14, True), batch_size=batch_size, share_pictures=share_pictures, max_new_tokens=12)
    assert len(set(one_by_one)) > 10, "the model must not answer everything alike, or this test shows nothing"
    assert got == one_by_one


def test_answers_equal_a_greedy_loop_without_cache(llava: Made, one_by_one: list[Reply]) -> None:
    model, processor = llava
    prompt = questions(14, True)[0]
    ids = encode_prompt(
        prompt.turns,
        processor.tokenizer,
        image_token_id=image_token_id(model.config),
        image_tokens=image_tokens(model.config),
    )
    pixels = processor.image_processor(images=list(prompt.images), return_tensors="pt")["pixel_values"]
    answer: list[int] = []
    for _ in range(12):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answer]), pixel_values=pixels).logits
        answer.append(int(logits[0, -1].argmax()))
        if answer[-1] == processor.tokenizer.eos_token_id:
            break
    assert one_by_one[0].text == processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_generation_stops_at_the_end_of_sequence(tiny_llava: Callable[..., Made], one_by_one: list[Reply]) -> None:
    model, processor = tiny_llava()
    lively(model)
    letter = next(c for c in one_by_one[0].text[1:] if c.isascii() and c.isalnum())
    processor.tokenizer.eos_token = letter  # a prompt of one question holds no EOS, so it stays what it was
    got = generate(model, processor, questions(14, True)[:1], max_new_tokens=12)
    assert one_by_one[0].truncated
    assert got == [Reply(one_by_one[0].text.split(letter)[0].strip(), truncated=False)]


def test_a_models_own_sampling_settings_do_not_matter(llava: Made, one_by_one: list[Reply]) -> None:
    model, processor = llava
    before = model.generation_config
    model.generation_config = type(before)(
        **{**before.to_dict(), "do_sample": True, "temperature": 0.9, "top_p": 0.6, "repetition_penalty": 1.3}
    )
    try:
        assert generate(model, processor, questions(14, True), batch_size=8, max_new_tokens=12) == one_by_one
    finally:
        model.generation_config = before


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=261, n_positions=512, n_embd=64, n_layer=2, n_head=2)).eval()


@pytest.mark.parametrize("make", [None, gpt2])
def test_text_only_models(tiny_llama: Callable[..., Made], make: Callable[[], Any] | None) -> None:
    model, tokenizer = tiny_llama()
    model = lively(make() if make else model)
    prompts = questions(9, False)
    alone = generate(model, tokenizer, prompts, batch_size=1, max_new_tokens=8)
    assert generate(model, tokenizer, prompts, batch_size=4, max_new_tokens=8) == alone
    assert len(set(alone)) > 5
