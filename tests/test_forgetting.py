"""The forgetting number: zero for the base itself, right by hand, the same through an adapter and with two models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from milora_vl.forgetting import Forgetting, general_text, measure_forgetting, text_blocks

Made = tuple[Any, Any]
SMALL: dict[str, Any] = {"num_tokens": 200, "block_length": 40, "batch_size": 2}


@pytest.fixture(scope="module")
def pair(tiny_llama: Callable[..., Made]) -> tuple[Any, Any, Any]:
    base, tokenizer = tiny_llama()
    tuned, _ = tiny_llama()
    torch.manual_seed(0)
    with torch.no_grad():
        for model, scale in ((base, 4), (tuned, 4)):
            for parameter in model.parameters():
                parameter.mul_(scale if parameter.ndim > 1 else 1)
        for parameter in tuned.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return tuned, base, tokenizer


def by_hand(tuned: Any, base: Any, blocks: list[list[int]]) -> dict[str, float]:
    cross, entropy, loss = [], [], []
    for ids in torch.tensor(blocks):
        with torch.no_grad():
            p = base(input_ids=ids[None]).logits[0, :-1].double().softmax(-1)
            log_q = tuned(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
        cross.append(-(p * log_q).sum(-1).mean())
        entropy.append(-(p * p.log()).sum(-1).mean())
        loss.append(torch.nn.functional.nll_loss(log_q, ids[1:]))
    stderr = torch.stack(cross).std() / len(cross) ** 0.5
    numbers = {"cross_entropy": cross, "base_entropy": entropy, "loss": loss}
    return {name: float(torch.stack(values).mean()) for name, values in numbers.items()} | {"stderr": float(stderr)}


def test_a_model_has_forgotten_nothing_of_itself(pair: tuple[Any, Any, Any]) -> None:
    _, base, tokenizer = pair
    got = measure_forgetting(base, tokenizer, base=base, **SMALL)
    assert got.kl == pytest.approx(0, abs=1e-9)
    assert got.cross_entropy == pytest.approx(got.base_entropy, abs=1e-9)
    assert got.loss_change == 0


def test_the_numbers_are_those_of_the_definition(pair: tuple[Any, Any, Any]) -> None:
    tuned, base, tokenizer = pair
    got = measure_forgetting(tuned, tokenizer, base=base, **SMALL)
    blocks = text_blocks(general_text(), tokenizer, num_tokens=200, block_length=40)
    expected = by_hand(tuned, base, blocks)
    assert {name: asdict(got)[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert got.kl == pytest.approx(got.cross_entropy - got.base_entropy)
    assert got.kl > 0.01
    assert (got.n_blocks, got.n_tokens) == (5, 5 * 39)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_size_does_not_matter(pair: tuple[Any, Any, Any], batch_size: int) -> None:
    tuned, base, tokenizer = pair
    first = measure_forgetting(tuned, tokenizer, base=base, **SMALL)
    second = measure_forgetting(tuned, tokenizer, base=base, **{**SMALL, "batch_size": batch_size})
    assert second.cross_entropy == pytest.approx(first.cross_entropy, rel=1e-6)


def test_an_adapter_is_compared_with_its_own_base(tiny_llava: Callable[..., Made]) -> None:
    from peft import LoraConfig, get_peft_model

    def measured(model: Any, base: Any | None) -> Forgetting:
        return measure_forgetting(model, processor.tokenizer, base=base, **SMALL)

    base, processor = tiny_llava()
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=r".*language_model.*proj", init_lora_weights=False)
    model = get_peft_model(tiny_llava()[0], config)
    alone = measured(model, None)
    two = measured(model, base)
    assert (alone.cross_entropy, alone.kl, alone.loss) == pytest.approx((two.cross_entropy, two.kl, two.loss), rel=1e-6)
    assert alone.kl > 1e-4


def test_blocks_take_turns_between_the_texts_and_start_alike(tiny_llama: Callable[..., Made]) -> None:
    tokenizer = tiny_llama()[1]
    blocks = text_blocks({"a": "a" * 100, "b": "b" * 30}, tokenizer, num_tokens=1000, block_length=11)
    texts = [tokenizer.decode(block, skip_special_tokens=True) for block in blocks]
    assert texts[:6] == ["a" * 10, "b" * 10] * 3
    assert texts[6:] == ["a" * 10] * 7
    assert {block[0] for block in blocks} == {tokenizer.bos_token_id}


def test_what_cannot_be_measured_is_said(pair: tuple[Any, Any, Any]) -> None:
    tuned, base, tokenizer = pair
    with pytest.raises(ValueError, match="against a base"):
        measure_forgetting(tuned, tokenizer, **SMALL)
    with pytest.raises(ValueError, match="shorter than one block"):
        measure_forgetting(tuned, tokenizer, base=base, texts={"short": "a few words"})


def test_the_package_brings_enough_text() -> None:
    texts = general_text()
    assert len(texts) == 3
    assert all(len(text) > 20_000 and text.isascii() and "Gutenberg" not in text for text in texts.values())
