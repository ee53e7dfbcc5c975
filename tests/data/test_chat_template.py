"""`--template chat_template`: ids and masks equal what transformers makes of the same messages."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from milora_data.encode.labels import IGNORE, encode, encode_prompt
from milora_data.keys import record_key
from milora_data.records import parse_record
from milora_data.records.record import Turn
from milora_data.show import pieces_of
from milora_vl import load_model
from milora_vl.common.errors import DataError
from milora_vl.models.base import load_processor
from milora_vl.models.generate import Prompt, prompt_ids
from support.chat_models import (
    MARKED,
    MISTRAL_TOOLS,
    SMOLLM2,
    TINY,
    TOOLS,
    TOOLS_MARKED,
    record,
    write_picture_model,
    write_text_model,
)
from support.conversations import BYTE_BPE, supervised_text
from support.problems import raises_code
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


def function_call(name: str, number: str, **arguments: Any) -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = [function_call("zoom", "a12345678", box=[1, 2], note='"é"'), function_call("count", "b12345678")]
TOOL_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": '{"seen": "no"}', "tool_call_id": "a12345678", "name": "zoom"},
    {"role": "tool", "content": "3", "tool_call_id": "b12345678", "name": "count"},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "I look again.", "tool_calls": CALLS[1:]},
    {"role": "tool", "content": "3", "tool_call_id": "b12345678", "name": "count"},
    {"role": "assistant", "content": "Yes."},
]
DEFINED = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("zoom", "count")
]


def test_show_marks_calls_of_tools_as_learnt_and_their_results_as_given() -> None:
    pieces = pieces_of(parse_record({"messages": TOOL_TURNS, "tools": DEFINED}))
    learnt = [text for kind, text in pieces if kind == "learnt"]
    assert [json.loads(text)["tool_calls"][0]["function"]["name"] for text in learnt[:1]] == ["zoom"]
    assert learnt[1::2] == ["Three.", "Yes."]
    assert learnt[2].startswith("I look again.\n{")
    assert any('tool: {"seen": "no"}' in text for kind, text in pieces if kind == "given")


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_calls_of_tools_are_learnt_and_their_results_are_not(system: list[dict[str, Any]]) -> None:
    tokenizer = with_template(BYTE_BPE, TOOLS)
    for end in (2, 5, 7, 9):
        messages = [*system, *TOOL_TURNS[:end]]
        theirs = tokenizer.apply_chat_template(
            messages, tools=DEFINED, chat_template=TOOLS_MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        value = {"messages": json.loads(json.dumps(messages)), "tools": DEFINED}
        value["messages"][len(system) + 1]["tool_calls"][0]["function"]["arguments"] = json.dumps(
            CALLS[0]["function"]["arguments"]  # OpenAI's form
        )
        made = encode(value, tokenizer, template="chat_template", image_token_id=-1)
        assert made.input_ids == list(theirs["input_ids"])
        assert not RIGHT_ASSISTANT_MASKS or mask(made.labels) == list(theirs["assistant_masks"])
        asked = tokenizer.apply_chat_template(
            messages[:-1], tools=DEFINED, return_dict=True, add_generation_prompt=True
        )
        prompt = encode_prompt(value, tokenizer, template="chat_template", image_token_id=-1)
        assert prompt == list(asked["input_ids"])


def test_calls_in_a_template_that_asks_for_no_answer() -> None:
    tokenizer = with_template(BYTE_BPE, MISTRAL_TOOLS)
    made = encode(
        {"messages": TOOL_TURNS[:5], "tools": DEFINED}, tokenizer, template="chat_template", image_token_id=-1
    )
    assert tokenizer.decode(made.input_ids) == tokenizer.apply_chat_template(TOOL_TURNS[:5], DEFINED, tokenize=False)
    calls = ", ".join(json.dumps(call["function"], ensure_ascii=False) for call in CALLS)
    assert supervised_text(made, tokenizer) == f"[TOOL_CALLS] [{calls}]</s> Three.</s>"


def test_calls_in_a_template_whose_request_starts_to_think() -> None:
    thinking = TOOLS.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}")
    tokenizer = with_template(BYTE_BPE, thinking)
    made = encode({"messages": TOOL_TURNS, "tools": DEFINED}, tokenizer, template="chat_template", image_token_id=-1)
    plain = encode(
        {"messages": TOOL_TURNS, "tools": DEFINED}, with_template(BYTE_BPE, TOOLS), template="chat_template",
        image_token_id=-1,
    )  # fmt: skip
    assert (made.input_ids, made.labels) == (plain.input_ids, plain.labels)


def test_records_of_llama_factory_and_ms_swift_have_the_same_calls() -> None:
    calls = [json.dumps(call["function"]) for call in CALLS]
    factory = {
        "conversations": [
            {"from": "human", "value": "How many?"},
            {"from": "function_call", "value": f"[{', '.join(calls)}]"},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "Three."},
        ],
        "tools": json.dumps([tool["function"] for tool in DEFINED]),
    }
    swift = {
        "messages": [
            {"role": "user", "content": "How many?"},
            *({"role": "tool_call", "content": call} for call in calls),
            {"role": "tool_response", "content": "3"},
            {"role": "assistant", "content": "Three."},
        ],
        "tools": json.dumps(DEFINED),
    }
    turns = parse_record(factory).turns
    assert turns == parse_record(swift).turns
    assert [turn.role for turn in turns] == ["tools", "user", "assistant", "tool", "assistant"]
    assert json.loads(turns[0].text) == DEFINED
    swift["messages"][1]["content"] = calls[1]
    assert record_key(parse_record(swift), str) != record_key(parse_record(factory), str)
    made = json.loads(turns[2].keys)["tool_calls"]
    assert [call["function"] for call in made] == [call["function"] for call in CALLS]


NO_TOOLS = TOOLS.replace("if tools", "if false").replace("if not tools", "if true")
NO_CALLS = TOOLS.replace("in m.tool_calls", "in []")
NO_RESULTS = TOOLS.replace("{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}", "")
ONE_CALL = TOOLS.replace("in m.tool_calls", "in (m.tool_calls or [])[:1]")
LATER = TOOLS.replace("{{ '<|im_end|>' }}", "{{ '' if m.tool_calls and m != messages[-1] else '<|im_end|>' }}")


@pytest.mark.parametrize("template", [SMOLLM2, NO_TOOLS, NO_CALLS, NO_RESULTS, ONE_CALL, LATER, "vicuna_v1"])
def test_a_template_without_a_form_for_tools_is_refused(template: str) -> None:
    tokenizer, own = with_template(BYTE_BPE, template), template != "vicuna_v1"
    value = {"messages": TOOL_TURNS[:5], "tools": DEFINED}
    with raises_code("record-tools", kind=DataError):
        encode(value, tokenizer, template="chat_template" if own else template, image_token_id=-1)


@pytest.mark.parametrize(
    "value",
    [
        {"messages": TOOL_TURNS, "tools": "zoom"},
        {"messages": TOOL_TURNS, "tools": [{"type": "function"}]},
        {"messages": [{"role": "user", "content": "a", "tool_calls": CALLS}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]},
        {"conversations": [{"from": "function_call", "value": "count()"}]},
    ],
)
def test_what_is_no_tool_and_no_call_is_refused(value: dict[str, Any]) -> None:
    with raises_code("record-tools", kind=DataError):
        parse_record(value)


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
    assert made.input_ids == [*theirs, tokenizer.eos_token_id]  # nothing else would make it stop
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
