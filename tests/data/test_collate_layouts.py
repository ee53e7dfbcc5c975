"""What batches promise a model: the same loss however records are batched, in LLaVA's own classes too."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from milora_data.batches.image_text_collator import ImageTextCollator
from milora_data.encode.labels import IGNORE
from milora_vl.common.errors import DataError
from support.llava_oracle import llava_train, original_llava
from support.problems import raises_code
from support.questions import TOKENS, image_id, question


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


@pytest.fixture
def llava_model(parts: Any, tmp_path: Path) -> Any:
    """LLaVA's own class with the tower, the projector and the language model of the tiny HF model."""
    llava_train()
    model, processor, _ = parts
    made = original_llava(model, processor, tmp_path, vocabulary=model.config.text_config.vocab_size)
    made.get_vision_tower().load_model()
    return made.eval()


def test_llavas_own_class_takes_a_batch_and_has_the_same_loss(
    parts: Any, llava_model: Any, tiny_records: list[dict[str, Any]]
) -> None:
    model, processor, options = parts
    several = question("<image>\nor <image>\n?", image=["1.png", "2.png"])
    records = [tiny_records[-1], several, *tiny_records[:2], tiny_records[-2]]
    hf = ImageTextCollator(processor.tokenizer, processor.image_processor, **options)(records)
    own = ImageTextCollator(processor.tokenizer, processor.image_processor, layout="llava", **options)(records)
    assert own["images"].shape[0] == 6  # one for each text alone, which LLaVA passes over
    assert (own["input_ids"] == -200).sum(1).tolist() == [0, 2, 1, 1, 0]
    assert (own["labels"] != IGNORE).sum() == (hf["labels"] != IGNORE).sum()
    result = llava_model(**own)
    assert result.loss.item() == pytest.approx(model(**hf).loss.item(), rel=1e-4)
    texts = ImageTextCollator(processor.tokenizer, processor.image_processor, layout="llava", **options)(records[-1:])
    llava_model(**texts).loss.backward()
    assert llava_model.get_model().mm_projector[0].weight.grad is not None
