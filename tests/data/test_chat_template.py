"""`--template chat_template`: ids and masks equal what transformers makes of the same messages."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from PIL import Image

from milora_data.encode.labels import IGNORE, encode, encode_prompt
from milora_data.records.record import Turn, parse_record
from milora_vl import load_model
from milora_vl.models.generate import Prompt, prompt_ids
from milora_vl.models.loading import load_processor
from support.chat_models import MARKED, SMOLLM2, TINY, record, write_picture_model, write_text_model
from support.conversations import BYTE_BPE
from support.versions import RIGHT_ASSISTANT_MASKS

CONVERSATIONS: list[list[tuple[str, str]]] = [
    [("user", "Hi"), ("assistant", "Ho")],
    [("system", "Be brief."), ("user", "Name two."), ("assistant", " One, two. "), ("user", "3?"), ("assistant", "3")],
    [("user", "a\nb"), ("assistant", "def f():\n    return 1\n"), ("user", "Sure?"), ("assistant", "Yes é🐱")],
]


def in_chat(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def with_template(tokenizer: Any, template: Any) -> Any:
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    return made


def mask(labels: list[int]) -> list[int]:
    return [int(label != IGNORE) for label in labels]


def check_against_transformers(tokenizer: Any, marked: str) -> None:
    for turns in CONVERSATIONS:
        theirs = tokenizer.apply_chat_template(
            in_chat(turns), chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        made = encode(record(turns), tokenizer, template="chat_template", image_token_id=-1)
        assert made.input_ids == list(theirs["input_ids"])
        assert not RIGHT_ASSISTANT_MASKS or mask(made.labels) == list(theirs["assistant_masks"])
        asked = tokenizer.apply_chat_template(
            in_chat(turns[:-1]), tokenize=True, return_dict=True, add_generation_prompt=True
        )
        assert encode_prompt(record(turns), tokenizer, template="chat_template", image_token_id=-1) == list(
            asked["input_ids"]
        )


def test_ids_and_mask_are_those_of_transformers() -> None:
    check_against_transformers(with_template(BYTE_BPE, SMOLLM2), MARKED)


def test_what_a_template_puts_between_the_prompt_and_the_answer_is_learnt() -> None:
    """The model has to write it: it comes behind what the model is asked with."""
    thinking = MARKED.replace("{{ message['content'] +", "{{ '<think>\n\n</think>\n\n' + message['content'] +")
    check_against_transformers(
        with_template(BYTE_BPE, thinking.replace("{% generation %}", "").replace("{% endgeneration %}", "")), thinking
    )


def test_ids_with_pictures_are_those_of_the_processor(tmp_path: Path) -> None:
    processor = load_processor(write_picture_model(tmp_path))
    tokenizer = processor.tokenizer
    value = record([("user", "<image>\nWhat?"), ("assistant", "That."), ("user", "Sure?"), ("assistant", "Yes.")], 1)
    picture: dict[str, Any] = {"type": "image", "image": Image.new("RGB", (32, 32))}
    parts = [
        {"role": turn["from"], "content": [{"type": "text", "text": turn["value"].removeprefix("<image>\n")}]}
        for turn in value["conversations"]
    ]
    parts[0]["content"].insert(0, picture)
    settings: dict[str, Any] = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "image_tokens": 16}
    theirs = processor.apply_chat_template(parts, tokenize=True, return_dict=True)["input_ids"][0]
    made = encode(value, tokenizer, template="chat_template", **settings)
    assert made.input_ids == [*theirs, tokenizer.eos_token_id]  # nothing else would tell it to stop
    learnt = [label for label in made.labels if label != IGNORE]
    assert tokenizer.decode(learnt) == " That.  Yes. </s>"
    asked = processor.apply_chat_template(parts[:1], tokenize=True, return_dict=True, add_generation_prompt=True)
    prompt = encode_prompt(parse_record(value | {"conversations": value["conversations"][:1]}), tokenizer,
                           template="chat_template", **settings)  # fmt: skip
    assert prompt == list(asked["input_ids"][0])
    exact = Prompt((Turn("user", "<image>\nWhat?"),), ("0.png",), form="exact")
    assert prompt_ids(exact, tokenizer, "chat_template", **settings) == prompt


def test_answers_of_another_chat_template_are_not_taken_for_the_same(tmp_path: Path) -> None:
    from milora_eval.run_suite import settings

    model, tokenizer = load_model(write_text_model(tmp_path))
    other = with_template(tokenizer, TINY.replace("[assistant]", "[you]"))
    found = [settings(model, each, "chat_template", "pad") for each in (tokenizer, other)]
    assert found[0] != found[1]
    assert settings(model, tokenizer, "vicuna_v1", "pad") == settings(model, other, "vicuna_v1", "pad")
