"""The collator: padding, masks, pictures of every kind of record, and batches without any picture."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from milora_data.batches.image_text_collator import ImageTextCollator
from milora_data.encode.labels import IGNORE, encode
from milora_data.pictures.load import ImageError
from milora_vl.common.errors import DataError
from support.problems import raises_code
from support.questions import TOKENS, image_id, question


@pytest.fixture
def model_and_processor(tiny_llava: Callable[..., Any]) -> tuple[Any, Any]:
    return tiny_llava()


@pytest.fixture
def make(model_and_processor: tuple[Any, Any], tiny_data: Path) -> Callable[..., ImageTextCollator]:
    _, processor = model_and_processor

    def collator(**options: Any) -> ImageTextCollator:
        given = {"image_folder": tiny_data / "images", "image_tokens": TOKENS, "image_token_id": image_id(processor)}
        return ImageTextCollator(processor.tokenizer, processor.image_processor, **(given | options))

    return collator


def test_rows_are_padded_on_the_right_and_the_mask_comes_from_lengths(
    make: Callable[..., Any], tiny_records: list[dict[str, Any]], model_and_processor: tuple[Any, Any]
) -> None:
    collator = make()
    # The EOS as padding: a mask made from ids would hide the end of every answer.
    collator.tokenizer.pad_token = collator.tokenizer.eos_token
    batch = collator(tiny_records)
    assert {name: tuple(value.shape)[:1] for name, value in batch.items()} == {
        "input_ids": (12,), "attention_mask": (12,), "labels": (12,), "pixel_values": (8,)
    }  # fmt: skip
    for row, record in enumerate(tiny_records):
        made = encode(record, collator.tokenizer, image_token_id=collator.image_token_id, image_tokens=TOKENS)
        length = len(made.input_ids)
        assert batch["input_ids"][row, :length].tolist() == made.input_ids
        assert batch["labels"][row, :length].tolist() == made.labels
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert set(batch["input_ids"][row, length:].tolist()) <= {collator.tokenizer.eos_token_id}
        assert set(batch["labels"][row, length:].tolist()) <= {IGNORE}


def test_pictures_come_in_the_order_of_records_and_turns(make: Callable[..., Any]) -> None:
    records = [
        question("<image> or <image>?", image=["2.png", "0.png"]),
        question("No picture."),
        question("<image>\nWhat?", image="1.png"),
    ]
    together = make()(records)["pixel_values"]
    alone = [make()([question("<image>", image=name)])["pixel_values"] for name in ("2.png", "0.png", "1.png")]
    assert torch.equal(together, torch.cat(alone))


def test_a_batch_without_pictures_keeps_the_projector_in_the_graph(
    make: Callable[..., Any], model_and_processor: tuple[Any, Any]
) -> None:
    model, _ = model_and_processor
    records = [question("What is one and one?", "Two."), question("And?", "So, that is how it is with it.")]
    batch = make()(records)
    assert batch["pixel_values"].shape[0] == 1
    assert int((batch["input_ids"] == model.config.image_token_index).sum()) == TOKENS
    without = dict(make()(records))
    keep = without["input_ids"] != model.config.image_token_index
    assert not batch["attention_mask"][~keep].any()
    assert (batch["labels"][~keep] == IGNORE).all()

    loss = model(**batch).loss
    loss.backward()
    projector = dict(model.named_parameters())["model.multi_modal_projector.linear_1.weight"]
    assert projector.grad is not None
    assert projector.grad.abs().max() == 0
    width = int(batch["attention_mask"].sum(1).max())
    text_only = {name: value[:, :width] for name, value in batch.items() if name != "pixel_values"}
    text_only["input_ids"] = text_only["input_ids"].masked_fill(~keep[:, :width], 0)
    assert torch.allclose(model(**text_only).loss, loss, atol=1e-6)


@pytest.fixture
def bad(tiny_data: Path) -> list[dict[str, Any]]:
    (tiny_data / "images" / "cut.png").write_bytes((tiny_data / "images" / "0.png").read_bytes()[:40])
    return [question("<image>\na", image="0.png"), question("<image>\nb", image="cut.png")]


def test_the_record_of_a_bad_picture_can_be_skipped(
    make: Callable[..., Any], bad: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    skip = make(bad_images="skip")
    good = make()(bad[:1])
    assert torch.equal(skip(bad)["pixel_values"], good["pixel_values"])
    assert skip(bad)["input_ids"].shape[0] == 1
    assert skip.counts() == {"skipped": 2, "unlearnable": 0, "cut": 0, "broken": 0}
    assert caplog.text.count("cut.png") == 2


def test_workers_count_into_the_process_that_reports(make: Callable[..., Any], bad: list[dict[str, Any]]) -> None:
    collator = make(bad_images="skip")
    loader = DataLoader(bad * 4, batch_size=2, num_workers=2, collate_fn=collator)  # type: ignore[arg-type]
    assert sum(len(batch["input_ids"]) for batch in loader) == 4
    assert collator.counts()["skipped"] == 4


def test_an_error_of_a_worker_keeps_its_class_code_place_and_hint(
    make: Callable[..., Any], bad: list[dict[str, Any]], tiny_data: Path
) -> None:
    loader = DataLoader(bad, batch_size=2, num_workers=1, collate_fn=make())  # type: ignore[arg-type]
    with pytest.raises(ImageError) as error:
        list(loader)
    problem = error.value.first
    assert (problem.code, problem.where) == ("image-unreadable", str(tiny_data / "images" / "cut.png"))
    assert "--bad_images skip" in problem.hint
    assert "Traceback" not in str(error.value)


@pytest.fixture
def parts(tiny_llava: Callable[..., Any], tiny_data: Path) -> tuple[Any, Any, dict[str, Any]]:
    model, processor = tiny_llava()
    options = {"image_folder": tiny_data / "images", "image_tokens": TOKENS, "image_token_id": image_id(processor)}
    return model, processor, options


def losses(model: Any, batch: dict[str, Any]) -> list[float]:
    """Summed loss of each row."""
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return each.sum(1).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12])
def test_order_and_batch_size_change_no_records_loss(
    parts: Any, tiny_records: list[dict[str, Any]], batch_size: int
) -> None:
    model, processor, options = parts
    collator = ImageTextCollator(processor.tokenizer, processor.image_processor, **options)
    alone = {record["id"]: losses(model, collator([record]))[0] for record in tiny_records}
    shuffled = random.Random(batch_size).sample(tiny_records, len(tiny_records))
    for start in range(0, len(shuffled), batch_size):
        some = shuffled[start : start + batch_size]
        for record, loss in zip(some, losses(model, collator(some)), strict=True):
            assert loss == pytest.approx(alone[record["id"]], rel=1e-4)


def test_a_text_with_the_picture_token_in_it_is_named(parts: Any) -> None:
    _, processor, options = parts
    collator = ImageTextCollator(processor.tokenizer, processor.image_processor, **options)
    collator.image_token_id = processor.tokenizer("?", add_special_tokens=False).input_ids[0]
    message = "a text contains the picture token"
    with raises_code("record-image-token-in-text", "What is it?", message, kind=DataError):
        collator([question("What is it?")])
