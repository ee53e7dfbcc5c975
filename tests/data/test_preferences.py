"""Pairs of answers as batches for DPO: forms of records, masks, errors, and a first loss of ln 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from milora_data.batches.image_text_collator import ImageTextCollator
from milora_data.batches.preferences import PreferenceCollator, pair_of
from milora_data.batches.processor_collator import ProcessorCollator
from milora_data.batches.record_collator import RecordCollator
from milora_data.records.record import Turn
from milora_vl.common.errors import DataError, UserError
from support.problems import raises_code
from support.versions import needs_places
from support.vlm_families import model_of, processor_of
from support.vlm_runs import write_pictures

pytestmark = pytest.mark.filterwarnings("ignore")
Made = tuple[Any, RecordCollator[Any], Any]


def pair(number: int, **more: Any) -> dict[str, Any]:
    return {
        "id": str(number),
        "images": [f"{number}.png"],
        "prompt": [{"role": "user", "content": "What is it?"}],
        "chosen": [{"role": "assistant", "content": f"It is {number}."}],
        "rejected": [{"role": "assistant", "content": "I cannot see anything at all."}],
        **more,
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def made(tiny_llava: Any, pictures: Path) -> Callable[[str], Made]:
    """Return a model, its collator and its tokenizer."""

    def make(name: str, **options: Any) -> Made:
        if name == "llava":
            model, processor = tiny_llava()
            tokenizer = processor.tokenizer
            ids = {"image_tokens": 16, "image_token_id": model.config.image_token_id}
            collate = ImageTextCollator(tokenizer, processor.image_processor, **ids, image_folder=pictures, **options)
            return model, collate, tokenizer
        processor = processor_of(name)
        model = model_of(name, processor)
        return model, ProcessorCollator(processor, image_folder=pictures, **options), processor.tokenizer

    return make


BOTH = ["llava", pytest.param("qwen2_vl", marks=needs_places)]


@pytest.mark.parametrize("name", BOTH)
def test_the_rows_are_those_of_supervised_training_with_the_last_answer_alone(name: str, made: Any) -> None:
    _, collate, tokenizer = made(name)
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    pairs = [pair(0), pair(1, prompt=[*earlier, *pair(1)["prompt"]])]
    batch = PreferenceCollator(collate)(pairs)
    records = [record for side in zip(*map(pair_of, pairs), strict=True) for record in side]
    expected = collate(records)
    assert batch.keys() == expected.keys() - {"labels"} | {"completion_mask"}
    assert all(torch.equal(batch[key], expected[key]) for key in batch if key != "completion_mask")
    texts = [
        tokenizer.decode(row[mask.bool()])
        for row, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    ends = {"llava": "</s>", "qwen2_vl": "<|im_end|>"}[name]
    answers = ["It is 0.", "It is 1.", *["I cannot see anything at all."] * 2]
    assert [text.strip() for text in texts] == [answer + ends for answer in answers]


def test_every_form_of_a_pair_gives_the_same_records() -> None:
    turns = (Turn("user", "<image>\nWhich colour?"), Turn("assistant", "Red."))
    question, answers = {"role": "user", "content": "Which colour?"}, ("Red.", "Blue.")
    messages = [[{"role": "assistant", "content": text}] for text in answers]
    speakers = [{"from": "gpt", "value": text} for text in answers]
    asked = [{"from": "human", "value": "<image>\nWhich colour?"}]
    forms: list[dict[str, Any]] = [
        {"prompt": "Which colour?", "chosen": answers[0], "rejected": answers[1], "images": ["a.png"]},
        {"prompt": [question], "chosen": messages[0], "rejected": messages[1], "images": ["a.png"]},
        {"chosen": [question, *messages[0]], "rejected": [question, *messages[1]], "images": ["a.png"]},
        {"conversations": asked, "chosen": speakers[0], "rejected": speakers[1], "image": "a.png"},
        {"conversations": asked, "chosen": answers[0], "rejected": answers[1], "images": ["a.png"]},
    ]
    for form in forms:
        good, bad = pair_of(form)
        assert (good.turns, bad.turns[-1].text) == (turns, "Blue.")
        assert good.images == bad.images == ("a.png",)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"prompt": "a", "chosen": "b"}, 'no "rejected"; the keys of this pair: prompt, chosen'),
        (
            {"prompt": "p", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"},
            '"chosen" must end with an answer',
        ),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "no question before the answer"),
        ({"conversations": 5, "chosen": "b", "rejected": "c"}, '"conversations" must be a list of turns'),
        (
            {"prompt": "a", "chosen": "b", "rejected": [{"role": "user", "content": "c"}] * 2},
            '"rejected" must end with an answer',
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}] * 2},
            "differ before the last answer",
        ),
    ],
)
def test_what_is_no_pair_is_named(value: dict[str, Any], text: str) -> None:
    with raises_code("preference-format", says=text, kind=DataError) as error:
        pair_of(value, source="pairs.json:3")
    assert error.value.first.code == "preference-format"
    assert error.value.first.where == "pairs.json:3"


def test_a_pair_is_never_halved(made: Any) -> None:
    with pytest.raises(UserError) as error:
        PreferenceCollator(made("llava", bad_images="skip")[1])
    assert error.value.first.code == "preference-skip"
    _, collate, _ = made("llava", max_length=300)
    long = pair(0, prompt=[{"role": "user", "content": "What is it? " * 60}])
    with pytest.raises(DataError) as error:
        PreferenceCollator(collate)([pair(1), long])
    assert error.value.first.code == "preference-no-answer"
