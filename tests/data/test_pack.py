"""Packing and grouping by length: no record twice or lost, little padding, and a loss that is the same as without."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface

from milora_data.batches.image_text_collator import ImageTextCollator
from milora_data.batches.lengths import LengthGroupedSampler, lengths_of
from milora_data.batches.pack import PackedRecords, Row, fill, joined, pack
from milora_data.encode.labels import IGNORE
from milora_data.stream import load_records
from support.questions import TOKENS, image_id, question


@given(st.lists(st.integers(0, 150), max_size=200), st.integers(0, 3))
def test_every_record_stands_in_one_row_that_holds_it(lengths: list[int], seed: int) -> None:
    rows = pack(lengths, 100, seed)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and sum(min(lengths[index], 100) for index in row) <= 100 for row in rows)
    assert rows == pack(lengths, 100, seed)


def llava_like(count: int) -> list[int]:
    """Lengths as in mix665k: most records a picture and one to five short exchanges, a few long texts without one."""
    rng = np.random.default_rng(0)
    pictures = 576 + 45 + rng.gamma(1.5, 80, count)
    texts = 45 + rng.lognormal(6, 0.9, count)
    return [int(n) for n in np.where(rng.random(count) < 0.94, pictures, texts).clip(60, 2048)]


@pytest.mark.parametrize("capacity", [4096, 8192])
def test_rows_are_at_least_95_percent_full(capacity: int) -> None:
    lengths = llava_like(20_000)
    rows = pack(lengths, capacity)
    assert fill(rows, lengths, capacity) >= 0.95
    # Drawn at random, not sorted by length: early rows hold records of the whole set.
    assert np.mean([index for row in rows[:500] for index in row]) == pytest.approx(10_000, rel=0.1)


@pytest.fixture
def parts(tiny_llava: Callable[..., Any], tiny_data: Path) -> tuple[Any, Any, dict[str, Any]]:
    model, processor = tiny_llava()
    options = {"image_folder": tiny_data / "images", "image_tokens": TOKENS, "image_token_id": image_id(processor)}
    return model, processor, options


def summed_losses(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Summed loss over all supervised tokens, and the gradient of the projector."""
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    model.zero_grad()
    loss.backward()
    weight = dict(model.named_parameters())["model.multi_modal_projector.linear_1.weight"]
    assert weight.grad is not None
    return torch.cat([loss.detach()[None], weight.grad.flatten()])


def test_no_record_is_learned_from_the_one_before_it() -> None:
    """A template may begin with an answer: its first token has no context."""
    first, second = Row([5, 6], [-100, 6], [2]), Row([7, 8], [7, 8], [2])
    assert joined([first, second]).labels == [-100, 6, -100, 8]


@pytest.mark.parametrize(("packing", "attention"), [("rows", "sdpa"), ("flat", "eager")])
def test_packed_equals_unpacked(
    parts: tuple[Any, Any, dict[str, Any]], tiny_data: Path, attention: str, packing: Any
) -> None:
    model, processor, options = parts
    model.set_attn_implementation(attention)
    records = list(load_records(tiny_data / "train.json"))
    collator = ImageTextCollator(processor.tokenizer, processor.image_processor, packing=packing, **options)
    rows = pack(lengths_of(records, collator), 800)
    assert max(map(len, rows)) > 1
    items = PackedRecords(records, rows)
    batch = collator([items[number] for number in range(len(items))])
    assert set(batch) == {"input_ids", "position_ids", "labels", "use_cache", "pixel_values"}
    assert batch["input_ids"].shape[0] == (1 if packing == "flat" else len(rows))
    together = summed_losses(model, batch)
    alone = sum(summed_losses(model, collator([record])) for record in records)
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-4)


def varlen(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any) -> tuple[Tensor, None]:
    """Attention within the borders of the records, as flash attention computes it."""
    assert mask is None
    lengths = options["cu_seq_lens_q"].diff().tolist()
    assert torch.equal(options["cu_seq_lens_q"], options["cu_seq_lens_k"])
    assert max(lengths) == options["max_length_q"] == options["max_length_k"]
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outs = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
    return torch.cat(outs, dim=2).transpose(1, 2), None


def test_flash_attention_gets_the_borders_of_packed_texts(tiny_llama: Callable[..., Any]) -> None:
    AttentionInterface.register("varlen", varlen)
    model, tokenizer = tiny_llama()
    records = [question("a", "b"), question("What?", "That."), question("And?", "So.")]
    batch = ImageTextCollator(tokenizer, packing="flat")([records[:2], records[2:]])
    del batch["labels"]
    expected = model(**{name: batch[name] for name in ("input_ids", "position_ids", "use_cache")}).logits
    model.set_attn_implementation("varlen")
    assert torch.allclose(model(**batch).logits, expected, atol=1e-5)


def test_a_row_of_texts_gets_a_hidden_picture_and_nothing_is_predicted_across_records(parts: Any) -> None:
    model, processor, options = parts
    collator = ImageTextCollator(processor.tokenizer, processor.image_processor, pad_to_multiple_of=64, **options)
    records = [question("a", "b"), question("What?", "That."), question("And?", "So.")]
    batch = collator([records[:2], records[2:]])
    assert batch["pixel_values"].shape[0] == 1
    first = batch["position_ids"] == 0
    assert (batch["labels"][first] == IGNORE).all()
    together = summed_losses(model, batch)
    alone = sum(summed_losses(model, collator([record])) for record in records)
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-4)


LENGTHS = [(37 * i) % 101 + 20 for i in range(1000)]


def padding(order: list[int], batch_size: int) -> int:
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return sum(max(LENGTHS[i] for i in batch) * len(batch) - sum(LENGTHS[i] for i in batch) for batch in batches)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    one, same, other = (LengthGroupedSampler(LENGTHS, 8, seed) for seed in (1, 1, 2))
    assert list(one) == list(one) == list(same) != list(other)
    same.set_epoch(1)
    assert list(one) != list(same)


@given(st.lists(st.tuples(st.integers(1, 500), st.booleans()), max_size=200), st.integers(1, 9), st.data())
def test_it_goes_on_in_the_middle_of_an_epoch(
    records: list[tuple[int, bool]], batch_size: int, data: st.DataObject
) -> None:
    lengths, kinds = [length for length, _ in records], [kind for _, kind in records]
    whole, begun, resumed = (LengthGroupedSampler(lengths, batch_size, 3, kinds=kinds) for _ in range(3))
    for sampler in (whole, begun):
        sampler.set_epoch(2)
    expected = list(whole)
    assert sorted(expected) == list(range(len(lengths)))
    done = data.draw(st.integers(0, max(0, len(lengths) - 1)))
    first = list(islice(begun, done))
    resumed.load_state_dict(begun.state_dict())
    assert first + list(resumed) == expected
    assert list(resumed) == expected  # the next epoch, until set_epoch names another


def test_kinds_are_not_mixed_but_at_the_end() -> None:
    kinds = [number % 3 == 0 for number in range(1000)]
    order = list(LengthGroupedSampler(LENGTHS, 8, kinds=kinds))
    batches = [{kinds[i] for i in order[start : start + 8]} for start in range(0, 1000, 8)]
    assert all(len(batch) == 1 for batch in batches[:-2])
    assert padding(order, 8) < 0.15 * padding(list(range(1000)), 8)
    with pytest.raises(ValueError, match="2 kinds for 3 lengths"):
        LengthGroupedSampler([1, 2, 3], 2, kinds=[True, False])
