"""The forgetting number: 0 for the base, equal to a direct computation, equal through an adapter and for two models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milora_vl.forgetting.answers import answer_batches, drawn_questions
from milora_vl.forgetting.measure import Forgetting, compare_on, general_text, measure_forgetting, summary, text_blocks

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


def by_hand(tuned: Any, base: Any, blocks: list[tuple[str, list[int]]]) -> dict[str, float]:
    """The definition, in float64; the standard error is the documents' means', weighted by their lengths."""
    cross, entropy, loss = [], [], []
    for ids in torch.tensor([ids for _, ids in blocks]):
        with torch.no_grad():
            p = base(input_ids=ids[None]).logits[0, :-1].double().softmax(-1)
            log_q = tuned(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
        cross.append(-(p * log_q).sum(-1).mean())
        entropy.append(-(p * p.log()).sum(-1).mean())
        loss.append(torch.nn.functional.nll_loss(log_q, ids[1:]))
    names = [name for name, _ in blocks]
    left = torch.stack(cross) - torch.stack(cross).mean()
    sums = [sum(float(x) for x, name in zip(left, names, strict=True) if name == one) for one in dict.fromkeys(names)]
    stderr = (len(sums) / (len(sums) - 1) * sum(x * x for x in sums)) ** 0.5 / len(blocks)
    numbers = {"cross_entropy": cross, "base_entropy": entropy, "loss": loss}
    return {name: float(torch.stack(values).mean()) for name, values in numbers.items()} | {"stderr": float(stderr)}


def test_a_model_has_forgotten_nothing_of_itself(
    pair: tuple[Any, Any, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milora_vl.common.progress.INTERVAL", 0.0)
    _, base, tokenizer = pair
    got = measure_forgetting(base, tokenizer, base=base, **SMALL)
    assert got.kl == pytest.approx(0, abs=1e-9)
    assert got.cross_entropy == pytest.approx(got.base_entropy, abs=1e-9)
    assert got.loss_change == 0
    assert "forgetting: " in capsys.readouterr().err  # one line for each batch in a log file


def test_each_module_keeps_its_mode(pair: tuple[Any, Any, Any]) -> None:
    tuned, base, tokenizer = pair
    tuned.train()
    frozen = tuned.model.layers[0].eval()
    try:
        measure_forgetting(tuned, tokenizer, base=base, **SMALL)
        assert tuned.training
        assert not frozen.training
    finally:
        tuned.eval()


def test_the_numbers_are_those_of_the_definition(pair: tuple[Any, Any, Any]) -> None:
    tuned, base, tokenizer = pair
    got = measure_forgetting(tuned, tokenizer, base=base, **SMALL)
    blocks = text_blocks(general_text(), tokenizer, num_tokens=200, block_length=40)
    expected = by_hand(tuned, base, blocks)
    assert {name: asdict(got)[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert got.kl == pytest.approx(got.cross_entropy - got.base_entropy)
    assert got.kl > 0.01
    assert (got.n_documents, got.n_blocks, got.n_tokens) == (3, 5, 5 * 39)


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
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for _, ids in blocks]
    assert texts[:6] == ["a" * 10, "b" * 10] * 3
    assert texts[6:] == ["a" * 10] * 7
    assert {ids[0] for _, ids in blocks} == {tokenizer.bos_token_id}
    assert [name for name, _ in blocks] == ["a", "b"] * 3 + ["a"] * 7


def test_short_texts_count_as_they_are(pair: tuple[Any, Any, Any]) -> None:
    """Each is its own block: nothing is left out, and each weighs what it holds."""
    tuned, base, tokenizer = pair
    short, long = "a few words", "so many words " * 3
    both, *alone = (
        measure_forgetting(tuned, tokenizer, base=base, texts=texts, block_length=len(long) + 1)
        for texts in ({"a": short, "b": long}, {"a": short}, {"b": long})
    )
    assert (both.n_documents, both.n_tokens) == (2, alone[0].n_tokens + alone[1].n_tokens)
    expected = sum(found.kl * found.n_tokens for found in alone) / both.n_tokens
    assert both.kl == pytest.approx(expected, rel=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.floats(0, 9), min_size=1, max_size=4), min_size=2, max_size=6), st.randoms())
def test_rows_of_one_document_count_as_one(documents: list[list[float]], random: Any) -> None:
    """Order does not matter, and a document cut into rows has the error of the document in one row."""
    rows = [(f"d{i}", value) for i, values in enumerate(documents) for value in values]
    random.shuffle(rows)
    cut = summary(torch.tensor([[v, 0, v, 0, 1] for _, v in rows], dtype=torch.float64), [n for n, _ in rows], "")
    whole = torch.tensor([[sum(d), 0, sum(d), 0, len(d)] for d in documents], dtype=torch.float64)
    joined = summary(whole, [f"d{i}" for i in range(len(documents))], "")
    assert (cut.kl, cut.kl_stderr) == (pytest.approx(joined.kl), pytest.approx(joined.kl_stderr, abs=1e-9))


def test_answers_about_pictures(tiny_llava: Callable[..., Made], tmp_path: Path) -> None:
    """Only the base's own answers count, a picture is a document, and the picture matters."""
    from peft import LoraConfig, get_peft_model

    base, processor = tiny_llava()
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=r".*language_model.*proj", init_lora_weights=False)
    tuned = get_peft_model(tiny_llava()[0], config)
    records = drawn_questions(tmp_path)
    assert len(records) == 80
    asked = {"image_folder": tmp_path, "max_new_tokens": 4}
    batches = list(answer_batches(tuned, processor, records[:8], without_adapter=True, **asked))
    for one, other in zip(batches, answer_batches(base, processor, records[:8], **asked), strict=True):
        assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
    got = compare_on(batches, tuned, what="pictures")
    assert (got.n_documents, got.kl > 1e-4) == (2, True)
    assert got.n_tokens < sum(batch.inputs["input_ids"].numel() for batch in batches) / 4
    assert compare_on(batches, base, base=base, what="same").kl == pytest.approx(0, abs=1e-9)
