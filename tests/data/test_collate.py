"""The collator: padding, masks, pictures of every kind of record, and batches without any picture."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from milora_data.batches.image_text_collator import ImageTextCollator
from milora_data.encode.labels import IGNORE, encode
from milora_data.pictures.files import ImageError
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


def test_pad_equals_the_processors_own_padding_and_is_not_done_twice(
    make: Callable[..., Any], tiny_data: Path, model_and_processor: tuple[Any, Any]
) -> None:
    Image.effect_noise((50, 20), 90).convert("RGB").save(tiny_data / "images" / "wide.png")
    _, processor = model_and_processor
    picture = Image.open(tiny_data / "images" / "wide.png")
    theirs = processor.image_processor(images=[picture], do_pad=True, return_tensors="pt")["pixel_values"]
    record = [question("<image>", image="wide.png")]
    assert torch.equal(make()(record)["pixel_values"], theirs)
    cropped = processor.image_processor(images=[picture], do_pad=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(make(image_aspect_ratio="plain")(record)["pixel_values"], cropped)
    assert not torch.equal(theirs, cropped)


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
    # The text is learnt as if no picture were there.
    width = int(batch["attention_mask"].sum(1).max())
    text_only = {name: value[:, :width] for name, value in batch.items() if name != "pixel_values"}
    text_only["input_ids"] = text_only["input_ids"].masked_fill(~keep[:, :width], 0)
    assert torch.allclose(model(**text_only).loss, loss, atol=1e-6)


def test_a_text_only_model_gets_no_pixels_and_refuses_pictures(make: Callable[..., Any]) -> None:
    collator = make()
    collator.image_processor = None
    assert set(collator([question("Hi")])) == {"input_ids", "attention_mask", "labels"}
    with raises_code("model-reads-only-text", kind=DataError):
        collator([question("<image>", image="0.png")])


def test_what_exceeds_max_length_is_cut_and_counted(make: Callable[..., Any]) -> None:
    record = question("What?", "A very long answer. " * 20)
    collator = make(max_length=250)
    batch = collator([record, question("a", "b")])
    assert int(batch["attention_mask"].sum(1).max()) == 250
    assert collator.counts()["cut"] == 1


def test_a_record_with_nothing_to_learn_is_left_out_and_counted(
    make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    collator = make(max_length=220)
    with caplog.at_level(logging.WARNING):
        batch = collator([question("a", "b"), question("word " * 60, "never reached")])
    assert batch["input_ids"].shape[0] == 1
    assert collator.counts() == {"skipped": 0, "replaced": 0, "unlearnable": 1, "cut": 0, "broken": 0}
    assert "no supervised answer" in caplog.text


@pytest.fixture
def bad(tiny_data: Path) -> list[dict[str, Any]]:
    (tiny_data / "images" / "cut.png").write_bytes((tiny_data / "images" / "0.png").read_bytes()[:40])
    return [question("<image>\na", image="0.png"), question("<image>\nb", image="cut.png")]


def test_a_bad_picture_stops_with_its_file_by_default(make: Callable[..., Any], bad: list[dict[str, Any]]) -> None:
    with raises_code("image-unreadable", says=r"cut.png: cannot read(.|\n)*--bad_images skip", kind=ImageError):
        make()(bad)


def test_a_bad_picture_can_be_skipped_or_replaced(
    make: Callable[..., Any], bad: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    skip, replace = make(bad_images="skip"), make(bad_images="replace")
    good = make()(bad[:1])
    assert torch.equal(skip(bad)["pixel_values"], good["pixel_values"])
    assert skip(bad)["input_ids"].shape[0] == 1
    assert skip.counts()["skipped"] == 2
    batch = replace(bad)
    assert batch["pixel_values"].shape[0] == batch["input_ids"].shape[0] == 2
    assert batch["pixel_values"][1].abs().max() < 0.02  # the mean colour
    assert replace.counts() == {"skipped": 0, "replaced": 1, "unlearnable": 0, "cut": 0, "broken": 0}
    assert caplog.text.count("cut.png") == 3


def test_a_batch_of_bad_records_repeats_the_last_good_one(make: Callable[..., Any], bad: list[dict[str, Any]]) -> None:
    collator = make(bad_images="skip")
    with raises_code("", message="every record of the first batch", kind=DataError):
        collator(bad[1:])
    good = collator(bad[:1])
    again = collator(bad[1:])
    assert all(torch.equal(good[name], again[name]) for name in good)


def test_workers_count_into_the_process_that_reports(make: Callable[..., Any], bad: list[dict[str, Any]]) -> None:
    collator = make(bad_images="replace")
    loader = DataLoader(bad * 4, batch_size=2, num_workers=2, collate_fn=collator)  # type: ignore[arg-type]
    assert sum(len(batch["input_ids"]) for batch in loader) == 8
    assert collator.counts()["replaced"] == 4


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


def test_the_picture_token_is_the_tokenizers_own_unless_given(
    make: Callable[..., Any], model_and_processor: tuple[Any, Any]
) -> None:
    from support.llava_oracle import llama_tokenizer

    _, processor = model_and_processor
    assert make(image_token_id=None).image_token_id == image_id(processor)
    with raises_code("", message="no <image> token", hint="image_token_id"):
        ImageTextCollator(llama_tokenizer("new"), processor.image_processor)
