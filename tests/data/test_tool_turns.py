"""Records with tools: the chat template writes them, and only what the assistant writes is supervised."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from milora_data.batches.image_text_collator import ImageTextCollator
from milora_data.batches.processor_collator import ProcessorCollator
from milora_data.encode.labels import encode, encode_prompt
from milora_data.records.record import parse_record
from milora_vl.common.errors import DataError
from milora_vl.models.tiny import tiny_tokenizer
from support.conversations import BYTE_BPE
from support.problems import raises_code
from support.versions import needs_places
from support.vlm_families import parts, processor_of
from support.vlm_runs import write_pictures

pytestmark = [pytest.mark.filterwarnings("ignore"), needs_places]
IMAGE_PART = "<|vision_start|><|image_pad|><|vision_end|>"
# As Qwen3-VL's: calls as JSON after the text, results as parts of a user's turn.
QWEN = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}"
    '\n<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}{% endif %}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{% if m.content is string %}{{ m.content }}{% else %}"
    + parts(IMAGE_PART)
    + "{% endif %}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n" + parts(IMAGE_PART) + "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3.2's: a call has no text, results are JSON, one call per turn.
LLAMA = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n{{ tools | tojson }}<|eot_id|>"
    "{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('only single tool-calls') }}{% endif %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% generation %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>{% endgeneration %}'
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% elif m.role == 'assistant' %}<|start_header_id|>assistant<|end_header_id|>\n\n{% generation %}"
    + parts("<|image|>")
    + "<|eot_id|>{% endgeneration %}{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    + parts("<|image|>")
    + "<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "zoom", "description": "Zoom.", "parameters": {"type": "object"}}}]


def call(number: int, **arguments: Any) -> dict[str, Any]:
    return {"id": f"call{number}", "type": "function", "function": {"name": "zoom", "arguments": json.dumps(arguments)}}


def dialogue(*, text: str | None = None, several: bool = False) -> dict[str, Any]:
    """A record of OpenAI's form: a call, or two, and their results; then a second question."""
    calls = [call(0, box=[1, 2], note="<|im_end|> \u6f22"), *([call(1)] if several else [])]
    results = [{"role": "tool", "tool_call_id": one["id"], "content": 'It is "red".'} for one in calls]
    return {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "Colour?"}]},
            {"role": "assistant", "content": text, "tool_calls": calls},
            *results,
            {"role": "assistant", "content": "Red."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ],
    }


FORMS = {"qwen3_vl": QWEN, "mllama": LLAMA}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def collator(name: str, pictures: Path, template: str | None = None) -> ProcessorCollator:
    processor = processor_of(name)
    template = FORMS.get(name) if template is None else template
    if template:
        processor.chat_template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return ProcessorCollator(processor, image_folder=pictures)


def oracle(name: str, value: dict[str, Any], collate: ProcessorCollator, pictures: Path) -> dict[str, Any]:
    """The batch that transformers makes with marks in the template; arguments are objects, contents parts."""
    messages = json.loads(json.dumps(value["messages"]))
    for message in messages:
        for one in message.get("tool_calls", []):
            one["function"]["arguments"] = json.loads(one["function"]["arguments"])
        content = message["content"] or ""
        if message["role"] != "tool" and isinstance(content, str):
            message["content"] = [{"type": "text", "text": content}]
        elif message["role"] != "tool":
            message["content"][0]["image"] = Image.open(pictures / "0.png").convert("RGB")
    batch = collate.inputs.processor.apply_chat_template(
        [messages],
        chat_template=FORMS[name],
        tools=value["tools"],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    batch["labels"] = batch["input_ids"].where(batch.pop("assistant_masks").bool(), -100)
    return dict(batch)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3_vl", {}),
        ("qwen3_vl", {"text": "Let me look.", "several": True}),
        ("mllama", {}),
    ],
)
def test_ids_and_masks_are_those_of_transformers(name: str, options: Any, pictures: Path) -> None:
    value, collate = dialogue(**options), collator(name, pictures)
    batch, expected = collate([value]), oracle(name, value, collate, pictures)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    text = collate.inputs.tokenizer.decode(batch["labels"][batch["labels"] != -100])
    assert "zoom" in text
    assert "Zoom." not in text
    assert '"red"' not in text
    record = parse_record(value)
    assert collate.num_tokens(record) == batch["input_ids"].shape[1]
    assert "".join(one.text for one in collate.segments(record) if one.supervised) == text


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: m[1]["tool_calls"][0]["function"].update(arguments="{broken"), "record-tool-call"),
        (lambda m: m[1].update(tool_calls=[{"type": "function"}]), "record-tool-call"),
        (lambda m: m[1].update(tool_calls="zoom"), "record-tool-call"),
        (lambda m: m.pop(1), "record-turn-order"),
        (lambda m: m.pop(2), "record-turn-order"),
        (lambda m: m[2].update(content=None), "messages-content"),
    ],
)
def test_what_is_no_call_or_result_is_named(change: Any, code: str, pictures: Path) -> None:
    value = dialogue()
    change(value["messages"])
    with pytest.raises(DataError) as error:
        collator("qwen3_vl", pictures)._rendered(parse_record(value, source="data.json:3"))
    assert (error.value.first.code, error.value.first.where) == (code, "data.json:3")


def text_only(value: dict[str, Any]) -> dict[str, Any]:
    messages = json.loads(json.dumps(value["messages"]))
    messages[0]["content"] = "Which colour is it?"
    return {**value, "messages": messages}


def in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of texts as the templates take them: contents in parts, arguments as objects."""
    made = copy.deepcopy(messages)
    for message in made:
        for one in message.get("tool_calls", []):
            one["function"]["arguments"] = json.loads(one["function"]["arguments"])
        if message["role"] != "tool":
            message["content"] = [{"type": "text", "text": message["content"] or ""}]
    return made


@pytest.mark.parametrize(("form", "options"), [(QWEN, {}), (QWEN, {"several": True, "text": "I look."}), (LLAMA, {})])
def test_text_models_train_on_tools_of_their_chat_template(form: str, options: dict[str, Any]) -> None:
    """Text and supervised part equal those of transformers with marks in the template.

    So do the ids, except that an answer is tokenized apart from the request for it, as at inference: a request that
    ends with line breaks gives other tokens where a brace follows.
    """
    tokenizer = copy.deepcopy(BYTE_BPE)
    tokenizer.chat_template = form.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    value = text_only(dialogue(**options))
    batch = ImageTextCollator(tokenizer, template="chat_template")([value])
    messages = in_parts(value["messages"])
    marked = tokenizer.apply_chat_template(
        messages, chat_template=form, tools=TOOLS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    expected = [i if kept else -100 for i, kept in zip(marked["input_ids"], marked["assistant_masks"], strict=True)]
    if form == QWEN:
        assert (ids, labels) == (marked["input_ids"], expected)
    assert tokenizer.decode(ids) == tokenizer.decode(marked["input_ids"])
    assert tokenizer.decode([i for i in labels if i >= 0]) == tokenizer.decode([i for i in expected if i >= 0])


def text_tokenizer(form: str = QWEN) -> Any:
    tokenizer = copy.deepcopy(BYTE_BPE)
    tokenizer.chat_template = form.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return tokenizer


@pytest.mark.parametrize("kept", [2, 4, 6])
@pytest.mark.parametrize("form", [QWEN, LLAMA])
def test_a_prompt_offers_the_tools_and_ends_where_the_next_answer_begins(form: str, kept: int) -> None:
    """Earlier answers have the tokens that they had in the training, also where a request ends with line breaks."""
    tokenizer, value = text_tokenizer(form), text_only(dialogue())
    value["messages"] = value["messages"][:kept]  # up to and including the call, the answer, and the last answer
    settings: dict[str, Any] = {"template": "chat_template", "image_token_id": -1}
    prompt = encode_prompt(parse_record(value), tokenizer, **settings)
    expected = tokenizer.apply_chat_template(
        in_parts(value["messages"][:-1]), tools=TOOLS, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    if form == QWEN:
        assert prompt == expected["input_ids"]
    assert tokenizer.decode(prompt) == tokenizer.decode(expected["input_ids"])
    assert encode(parse_record(value), tokenizer, **settings).input_ids[: len(prompt)] == prompt


def test_a_tool_that_names_a_picture_marker_is_refused() -> None:
    """The marker would become tokens of a picture."""
    value = text_only(dialogue())
    value["tools"] = [{"type": "function", "function": {"name": "zoom", "description": "Into <image>."}}]
    with pytest.raises(DataError) as error:
        ImageTextCollator(text_tokenizer(), template="chat_template")([value])
    assert error.value.first.code == "record-tools-picture"


def test_templates_that_do_not_write_tools_refuse_them(pictures: Path) -> None:
    with raises_code("chat-template-no-tools", message="not write lists of tools and calls of tools", kind=DataError):
        collator("qwen2_5_vl", pictures)([dialogue()])
    with raises_code("chat-template-refuses", kind=DataError):
        collator("mllama", pictures)([dialogue(several=True)])
    fast = ImageTextCollator(tiny_tokenizer(), image_tokens=4, image_folder=pictures)
    tools_alone = {"tools": TOOLS, "messages": [dialogue()["messages"][0], {"role": "assistant", "content": "Red."}]}
    for value in (dialogue(), tools_alone):
        with pytest.raises(DataError) as error:
            fast([value])
        assert error.value.first.code == "record-tools"
    with pytest.raises(DataError) as error:
        collator("qwen3_vl", pictures)([{**tools_alone, "tools": "zoom"}])
    assert error.value.first.code == "record-tools-field"
