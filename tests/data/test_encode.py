"""Encoding: equal to LLaVA's own preprocessing on well-formed records, and right where LLaVA masks everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings

from milora_data.encode.labels import IGNORE, NoSupervisedTokens, encode, encode_prompt
from milora_data.encode.templates import TEMPLATES
from milora_data.records import parse_record
from milora_data.records.record import IMAGE
from milora_vl.common.errors import DataError
from support.conversations import KINDS, answers, as_llava, conversations, record, supervised_text, texts
from support.llava_oracle import llama_tokenizer, llava_ids
from support.problems import raises_code

CONVERSATIONS = json.loads((Path(__file__).parents[1] / "reference" / "conversations.json").read_text(encoding="utf-8"))
IMG = 32000
SYSTEM = TEMPLATES["vicuna_v1"].system + " "


@pytest.mark.parametrize("value", CONVERSATIONS, ids=lambda value: str(value["id"]))
def test_reference_conversation_equals_llava(value: dict[str, Any]) -> None:
    for kind in KINDS:
        tokenizer = llama_tokenizer(kind)
        their_ids, their_labels = llava_ids(value, tokenizer)
        ids, labels = as_llava(value, tokenizer)
        if any(not turn["value"] for turn in value["conversations"]):
            assert any(label != IGNORE for label in labels), kind  # LLaVA drops the separators of an empty turn
            continue
        assert ids == their_ids, kind
        if all(label == IGNORE for label in their_labels):
            assert any(label != IGNORE for label in labels), kind  # they lost count and gave the record up
        else:
            assert labels == their_labels, kind


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=conversations())
def test_any_well_formed_conversation_equals_llava(kind: str, value: dict[str, Any]) -> None:
    tokenizer = llama_tokenizer(kind)
    assert as_llava(value, tokenizer) == llava_ids(value, tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(caption=answers, question=texts)
def test_any_caption_equals_llavas_plain(kind: str, caption: str, question: str) -> None:
    assume((caption + question).encode("utf-8", "replace").decode() == caption + question)
    value = record(question.replace(IMAGE, "") + IMAGE, caption, images=1)
    tokenizer = llama_tokenizer(kind)
    assert as_llava(value, tokenizer, "plain") == llava_ids(value, tokenizer, "plain")


UNWELL = {
    "answer with the role in it": ("Who speaks?", "He said: ASSISTANT: yes. USER: no."),
    "end of sequence in an answer": ("How does it end?", "With </s> it ends."),
    "unknown token in a question": ("What is <unk>?", "A token."),
    "unknown token in an answer": ("What is it?", "It is <unk>."),
}


@pytest.mark.parametrize("name", UNWELL)
@pytest.mark.parametrize("kind", KINDS)
def test_is_right_where_llava_masks_the_whole_conversation(kind: str, name: str) -> None:
    tokenizer = llama_tokenizer(kind)
    value = record("Hello", "Hi.", *UNWELL[name])
    their_ids, their_labels = llava_ids(value, tokenizer)
    made = encode(value, tokenizer, image_token_id=IMG)
    assert made.input_ids == their_ids
    assert all(label == IGNORE for label in their_labels)
    assert supervised_text(made, tokenizer).replace(" ", "") == f"Hi.</s>{UNWELL[name][1]}</s>".replace(" ", "")


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_answer_teaches_its_end_and_spoils_nothing(kind: str) -> None:
    tokenizer = llama_tokenizer(kind)
    alone = record("Say nothing.", "")
    assert all(label == IGNORE for label in llava_ids(alone, tokenizer)[1])
    assert encode(alone, tokenizer, image_token_id=IMG).labels[-1] == tokenizer.eos_token_id
    made = encode(record("Say nothing.", "", "And now?", "Now I speak."), tokenizer, image_token_id=IMG)
    assert supervised_text(made, tokenizer) == "</s> Now I speak.</s>"


def test_each_picture_gets_its_own_number_of_tokens() -> None:
    tokenizer = llama_tokenizer("new")
    value = record("First <image> and second <image>?", "Both.", images=2)
    made = encode(value, tokenizer, image_token_id=IMG, image_tokens=[2, 3])
    assert [made.input_ids.count(IMG), made.num_images] == [5, 2]
    first = made.input_ids.index(IMG)
    assert made.input_ids[first : first + 3] == [IMG, IMG, made.input_ids[first + 2]] != [IMG] * 3
    assert tokenizer.decode(made.input_ids[:first]).endswith("USER: First ")
    with raises_code("", message="3 counts for 2 pictures", kind=DataError):
        encode(value, tokenizer, image_token_id=IMG, image_tokens=[1, 1, 1])


@pytest.mark.parametrize(("text", "images"), [("no placeholder", 1), ("<image> here", 0), ("<image><image>", 3)])
def test_a_picture_too_many_or_too_few_is_named_with_file_and_line(text: str, images: int) -> None:
    value = parse_record(record(text, "Yes.", images=images), source="train.json:17")
    with raises_code(
        "record-image-count",
        says=f"^train\\.json:17: \\d <image> in the conversation, but {images} picture",
        kind=DataError,
    ) as error:
        encode(value, llama_tokenizer("new"), image_token_id=IMG)
    assert (error.value.first.code, error.value.first.where) == ("record-image-count", "train.json:17")


def test_cutting_keeps_a_prefix_and_never_a_part_of_a_picture() -> None:
    tokenizer = llama_tokenizer("new")
    value = record("<image>\nWhat is it?", "A cat.", "<image>\nAnd this?", "A dog.", images=2)
    whole = encode(value, tokenizer, image_token_id=IMG, image_tokens=10)
    first_answer = next(i for i, label in enumerate(whole.labels) if label != IGNORE)
    for length in range(first_answer + 1, len(whole.input_ids) + 2):
        made = encode(value, tokenizer, image_token_id=IMG, image_tokens=10, max_length=length)
        kept = len(made.input_ids)
        assert kept <= length
        assert (made.input_ids, made.labels) == (whole.input_ids[:kept], whole.labels[:kept])
        assert made.input_ids.count(IMG) == 10 * made.num_images
        assert made.num_cut == len(whole.input_ids) - kept
        assert kept == min(length, len(whole.input_ids)) or whole.input_ids[kept] == IMG


def test_a_record_with_nothing_left_to_learn_is_an_error() -> None:
    tokenizer = llama_tokenizer("new")
    value = parse_record(record("<image>\nWhat is it?", "A cat.", images=1), source="a.jsonl:4")
    with raises_code("record-no-answer", message="max_length 20 cuts off", kind=NoSupervisedTokens) as error:
        encode(value, tokenizer, image_token_id=IMG, image_tokens=10, max_length=20)
    assert (error.value.first.code, error.value.first.where) == ("record-no-answer", "a.jsonl:4")
    with pytest.raises(NoSupervisedTokens):
        encode(record("A question alone?"), tokenizer, image_token_id=IMG)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", CONVERSATIONS[:14], ids=lambda value: str(value["id"]))
def test_the_prompt_is_the_conversation_up_to_its_last_answer(kind: str, value: dict[str, Any]) -> None:
    tokenizer = llama_tokenizer(kind)
    made = encode(value, tokenizer, image_token_id=IMG, image_tokens=4)
    prompt = encode_prompt(value, tokenizer, image_token_id=IMG, image_tokens=4)
    assert made.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith(" ASSISTANT:")
    assert made.labels[len(prompt) - 1] == IGNORE
    assert IGNORE not in made.labels[len(prompt) :]
    turns = parse_record(value).turns[:-1]
    assert encode_prompt(turns, tokenizer, image_token_id=IMG, image_tokens=4) == prompt
