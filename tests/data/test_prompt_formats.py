"""Every template: what is supervised is the answers and their ends, LLaVA's own ids where it has the format too."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AddedToken, AutoProcessor, LlavaProcessor

from milora_data.encode.labels import IGNORE, Encoded, encode, encode_prompt
from milora_data.encode.templates import TEMPLATES, images_first, render, render_chat_template
from milora_data.encode.tokens import remember_legacy
from milora_data.records import ROLES
from milora_data.records.record import Turn
from milora_vl.common.errors import DataError
from support.conversations import BYTE_BPE, KINDS, MARKS, as_llava, conversations, record, supervised_text
from support.llava_oracle import byte_bpe, llama_tokenizer, llava_ids
from support.problems import raises_code
from support.versions import RIGHT_ASSISTANT_MASKS

IMG = 32000


ENDS = {
    "vicuna_v1": (" ", "</s>"),
    "mistral": (" ", " </s>"),
    "chatml": ("", "<|im_end|>"),
    "qwen": ("", "<|im_end|>"),
    "llama_3": ("", "<|eot_id|>"),
    "alpaca": ("", "</s>"),
    "tulu": ("", "</s>"),
}


anything = st.text(max_size=40) | st.text(alphabet="a \n\t.é中🐱", max_size=12)


valid = anything.filter(
    lambda text: text.encode("utf-8", "replace").decode() == text and not any(mark in text for mark in MARKS)
)


@pytest.mark.parametrize("template", ENDS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(turns=st.lists(st.tuples(valid, valid), min_size=1, max_size=3), system=st.none() | valid)
def test_learnt_are_the_answers_and_their_ends(template: str, turns: list[tuple[str, str]], system: str | None) -> None:
    value = record(*[text for turn in turns for text in turn])
    if system is not None:
        value["conversations"].insert(0, {"from": "system", "value": system})
    lead, end = ENDS[template]
    made = encode(value, BYTE_BPE, template=template, image_token_id=IMG)
    assert supervised_text(made, BYTE_BPE) == "".join(lead + answer + end for _, answer in turns)
    for question, _ in turns:
        assert question in BYTE_BPE.decode(made.input_ids)
    prompt = encode_prompt(value, BYTE_BPE, template=template, image_token_id=IMG)
    assert made.input_ids[: len(prompt)] == prompt
    assert IGNORE not in made.labels[len(prompt) : len(prompt) + 1]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=conversations())
def test_any_well_formed_conversation_equals_llavas_llama_2(kind: str, value: dict[str, Any]) -> None:
    assume(not any("[/INST]" in turn["value"] for turn in value["conversations"]))
    tokenizer = llama_tokenizer(kind)
    their_ids, their_labels = llava_ids(value, tokenizer, "mistral_instruct")
    ids, labels = as_llava(value, tokenizer, "mistral")
    assert ids == their_ids
    if set(their_labels) == {IGNORE}:  # they count a piece less behind </s>, and give the conversation up
        assert kind == "new"
        assert len(value["conversations"]) > 2
        assert set(labels) != {IGNORE}
    else:
        assert labels == their_labels


def test_rendered_texts_of_the_formats() -> None:
    def text(template: str, *turns: str, system: str | None = None) -> str:
        value = record(*turns)["conversations"]
        value = ([{"from": "system", "value": system}] if system is not None else []) + value
        made = encode({"conversations": value}, BYTE_BPE, template=template, image_token_id=IMG)
        return str(BYTE_BPE.decode(made.input_ids))

    assert text("llama_3", "Hi", "Ho", system="S") == (
        "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHo<|eot_id|>"
    )
    assert text("qwen", "Hi", "Ho") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    )
    assert text("chatml", "Hi", "Ho") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    assert text("mistral", "Hi", "Ho", "And?", "So.") == "[INST] Hi [/INST] Ho </s>[INST] And? [/INST] So. </s>"
    assert text("mistral", "Hi", "Ho", system="S") == "[INST] <<SYS>>\nS\n<</SYS>>\n\nHi [/INST] Ho </s>"


# BPE of GPT-2's kind joins the two newlines of Llama 3 at the end of a prompt only; Llama 3's own always does.
SAVED = [(name, kind) for name in ENDS for kind in ("byte BPE", "new", "legacy")]


SAVED.remove(("llama_3", "byte BPE"))


@functools.cache
def tokenizer_with_picture(kind: str) -> Any:
    tokenizer = copy.deepcopy(llama_tokenizer(kind))
    tokens = [AddedToken(mark, special=True, normalized=False) for mark in MARKS[1:]]
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


@pytest.mark.parametrize(("template", "kind"), SAVED)
def test_the_saved_chat_template_makes_the_same_ids(template: str, kind: str) -> None:
    tokenizer = BYTE_BPE if kind == "byte BPE" else tokenizer_with_picture(kind)
    jinja = render_chat_template(template, tokenizer, bos=True)
    image = tokenizer.convert_tokens_to_ids("<image>")
    for system in (None, "Be brief."):
        value = record("<image>\nWhat?", "That.", "Sure?", " Yes. ", images=1)
        if system:
            value["conversations"].insert(0, {"from": "system", "value": system})
        messages = [
            {"role": {"human": "user", "gpt": "assistant"}.get(turn["from"], "system"), "content": turn["value"]}
            for turn in value["conversations"]
        ]
        options: dict[str, Any] = {"chat_template": jinja, "tokenize": True, "return_dict": True}
        theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
        made = encode(value, tokenizer, template=template, image_token_id=image, image_tokens=1)
        assert list(theirs["input_ids"]) == made.input_ids
        if RIGHT_ASSISTANT_MASKS:
            assert list(theirs["assistant_masks"]) == [int(label != IGNORE) for label in made.labels]


OWN = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "trimming, as Llama 3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "without an end, as llava-hf": (
        "{% for m in messages %}{{ m.role | upper }}: "
        "{% for c in m.content %}{{ c.text + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
}


@pytest.mark.parametrize("kind", OWN)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(turns=st.lists(st.tuples(valid, valid), min_size=1, max_size=3))
def test_any_chat_template_of_a_tokenizer(kind: str, turns: list[tuple[str, str]]) -> None:
    tokenizer = own(kind)
    value = record(*[text for turn in turns for text in turn])
    made = encode(value, tokenizer, template="chat_template", image_token_id=IMG)
    messages = [
        {"role": "assistant" if number % 2 else "user", "content": turn["value"]}
        for number, turn in enumerate(value["conversations"])
    ]
    if kind.startswith("without"):
        expected = "".join(f" {answer} " for _, answer in turns) + "</s>"  # nothing else would make it stop
    else:
        theirs = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(made.input_ids) == theirs
        cut, end = (str.strip, "<|eot_id|>") if kind.startswith("trim") else (str, "<|im_end|>")
        expected = "".join(cut(answer) + end for _, answer in turns)
    assert supervised_text(made, tokenizer) == expected
    prompt = encode_prompt(value, tokenizer, template="chat_template", image_token_id=IMG)
    assert made.input_ids[: len(prompt)] == prompt


def own(kind: str) -> Any:
    if kind not in _own:
        _own[kind] = copy.deepcopy(BYTE_BPE)
        _own[kind].chat_template = OWN[kind]
    return _own[kind]


_own: dict[str, Any] = {}


def test_mistakes_with_a_tokenizers_own_template() -> None:
    with raises_code("template-missing"):
        encode(record("a", "b"), BYTE_BPE, template="chat_template", image_token_id=IMG)
    tokenizer = copy.deepcopy(BYTE_BPE)
    tokenizer.chat_template = "{{ raise_exception('only cats may speak') }}"
    with raises_code("chat-template-refuses", message="only cats"):
        encode(record("a", "b"), tokenizer, template="chat_template", image_token_id=IMG)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | replace('b', 'c') }}{% endfor %}"
    with pytest.raises(DataError) as error:
        encode(record("a", "b"), tokenizer, template="chat_template", image_token_id=IMG)
    assert "rewrites an answer" in str(error.value)


QUESTION = "Is ice cold?\n\nAnswer format: true/false"


ANSWER = "the correct answer is true"


BLANKS = " " * 16


TEXTS = {
    # AGI-Edgerunners/LLM-Adapters finetune.py, generate_prompt; its two blanks and its line of blanks included.
    "llm_adapters": "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.  \n\n"
    f"{BLANKS}### Instruction:\n{BLANKS}{QUESTION}\n{BLANKS}\n{BLANKS}### Response:\n{BLANKS}{ANSWER}</s>",
    # sufenlp/MiLoRA train.py and GraphPKU/PiSSA train.py, PROMPT; what is supervised follows the colon at once.
    "alpaca": "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    f"### Instruction:\n{QUESTION}\n\n### Response:{ANSWER}</s>",
    # allenai/open-instruct, encode_with_messages_format.
    "tulu": f"<|user|>\n{QUESTION}\n<|assistant|>\n{ANSWER}</s>",
}


RECORD = {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]}


SENTENCE_PIECE = ["legacy", "new", "prepend"]


def tokenizer_of(kind: str) -> Any:
    return byte_bpe() if kind == "byte BPE" else llama_tokenizer(kind)


def ours(template: str, tokenizer: Any, max_length: int | None = None) -> Encoded:
    return encode(RECORD, tokenizer, template=template, image_token_id=-1, max_length=max_length)


@pytest.mark.parametrize("template", TEXTS)
def test_the_text_is_that_of_the_authors(template: str) -> None:
    segments = render([Turn("user", QUESTION), Turn("assistant", ANSWER)], TEMPLATES[template], "</s>")
    assert "".join(segment.text for segment in segments) == TEXTS[template]


@pytest.mark.parametrize("kind", [*SENTENCE_PIECE, "byte BPE"])
@pytest.mark.parametrize("cutoff", [256, 30])
def test_llm_adapters_learns_prompt_and_answer(kind: str, cutoff: int) -> None:
    """finetune.py: the text is tokenized whole and cut, the EOS appended where it still fits; all of it is a target."""
    tokenizer = tokenizer_of(kind)
    text = TEXTS["llm_adapters"].removesuffix("</s>")
    ids = tokenizer(text, truncation=True, max_length=cutoff)["input_ids"]
    if len(ids) < cutoff:
        ids.append(tokenizer.eos_token_id)
    made = ours("llm_adapters", tokenizer, cutoff)
    assert made.input_ids == ids
    assert made.labels[1:] == ids[1:]  # nothing stands before the first, to predict it from


@pytest.mark.parametrize("kind", SENTENCE_PIECE)
@pytest.mark.parametrize("cutoff", [512, 60])
def test_alpaca_learns_the_answer_alone(kind: str, cutoff: int) -> None:
    """train.py: the text with its EOS is tokenized whole, and as many targets left out as the prompt alone has ids."""
    tokenizer = tokenizer_of(kind)
    text = TEXTS["alpaca"].replace("</s>", tokenizer.eos_token)
    ids = tokenizer(text, truncation=True, max_length=cutoff)["input_ids"]
    given = len(tokenizer(text[: text.index(ANSWER)])["input_ids"])
    made = ours("alpaca", tokenizer, cutoff)
    assert made.input_ids == ids
    assert made.labels == [IGNORE] * given + ids[given:]


CONVERSATIONS = json.loads((Path(__file__).parents[1] / "reference" / "conversations.json").read_text(encoding="utf-8"))

SEVERAL = {
    "id": "several",
    "image": ["a", "b", "c"],
    "conversations": [
        {"from": "human", "value": "<image>\n<image>\nWhich is larger?"},
        {"from": "gpt", "value": "The first."},
        {"from": "human", "value": "<image>\nAnd now?"},
        {"from": "gpt", "value": "This one."},
    ],
}


def with_image_token(tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    if "<image>" not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module", params=["legacy", "new", "prepend", "byte BPE", "tiny"])
def processor(request: pytest.FixtureRequest, tiny_llava: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A LLaVA processor with our chat template, as it comes back from a saved folder."""
    _, tiny = tiny_llava()
    known = {"byte BPE": byte_bpe, "tiny": lambda: tiny.tokenizer}
    tokenizer = with_image_token(known.get(request.param, lambda: llama_tokenizer(request.param))())
    made = LlavaProcessor(
        image_processor=tiny.image_processor,
        tokenizer=tokenizer,
        patch_size=tiny.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    made.chat_template = render_chat_template("vicuna_v1", tokenizer)
    remember_legacy(tokenizer)
    folder = tmp_path_factory.mktemp("processor")
    made.save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


def messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The record as the messages of a processor: pictures and texts as parts."""
    made = []
    for turn in record["conversations"]:
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(turn["value"].replace("<image>\n", "<image>").split("<image>")):
            parts += [{"type": "image", "image": Image.new("RGB", (32, 32))}] * bool(number)
            parts += [{"type": "text", "text": text}] * bool(text)
        made.append({"role": ROLES[turn["from"]], "content": parts})
    return made


def test_apply_chat_template_makes_our_ids_and_mask(processor: Any) -> None:
    tokenizer = processor.tokenizer
    options = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "image_tokens": 16}
    checked = 0
    for each in [SEVERAL, *CONVERSATIONS]:
        made = encode(each, tokenizer, **options)
        theirs = processor.apply_chat_template(
            messages(each), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert list(theirs["input_ids"][0]) == made.input_ids, each["id"]
        if RIGHT_ASSISTANT_MASKS:
            mask = [int(label != IGNORE) for label in made.labels]
            assert list(theirs["assistant_masks"][0]) == mask, each["id"]
        prompt = processor.apply_chat_template(
            messages(each)[:-1], tokenize=True, return_dict=True, add_generation_prompt=True
        )
        assert list(prompt["input_ids"][0]) == encode_prompt(each, tokenizer, **options), each["id"]
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize(
    ("text", "placed"),
    [
        ("What is it?\n<image>", "<image>\nWhat is it?"),
        ("<image>What is it?", "<image>\nWhat is it?"),
        (" see <image> here ", "<image>\nsee  here"),
        ("<image>\n", "<image>"),
        (" no picture ", " no picture "),
    ],
)
def test_one_picture_goes_in_front_of_its_turn(text: str, placed: str) -> None:
    assert images_first([Turn("user", text)], text.count("<image>")) == [Turn("user", placed)]


def test_several_pictures_stay_where_they_are_if_each_has_a_file() -> None:
    turn = Turn("user", "Left: <image>\nRight: <image>\nSame?")
    assert images_first([turn], 2) == [turn]
