"""Templates: rendering by segments, where pictures go, and the chat template that says the same in Jinja."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AddedToken, AutoProcessor, LlavaProcessor

from milora_data.encode.labels import IGNORE, encode, encode_prompt
from milora_data.encode.templates import place_images, render_chat_template
from milora_data.encode.tokens import remember_legacy
from milora_data.records.record import ROLES, Turn
from milora_vl.common.errors import DataError
from support.llava_oracle import byte_bpe, llama_tokenizer
from support.problems import raises_code
from support.versions import RIGHT_ASSISTANT_MASKS

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
    for record in [SEVERAL, *CONVERSATIONS]:
        if record["id"] == "picture-twice-in-one-turn":
            continue  # two placeholders for one picture, which messages cannot say
        made = encode(record, tokenizer, **options)
        theirs = processor.apply_chat_template(
            messages(record), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert list(theirs["input_ids"][0]) == made.input_ids, record["id"]
        if RIGHT_ASSISTANT_MASKS:
            mask = [int(label != IGNORE) for label in made.labels]
            assert list(theirs["assistant_masks"][0]) == mask, record["id"]
        prompt = processor.apply_chat_template(
            messages(record)[:-1], tokenize=True, return_dict=True, add_generation_prompt=True
        )
        assert list(prompt["input_ids"][0]) == encode_prompt(record, tokenizer, **options), record["id"]
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
    assert place_images([Turn("user", text)], text.count("<image>")) == [Turn("user", placed)]


def test_several_pictures_stay_where_they_are_if_each_has_a_file() -> None:
    turn = Turn("user", "Left: <image>\nRight: <image>\nSame?")
    assert place_images([turn], 2) == [turn]
    assert place_images([turn], 1) == [Turn("user", "<image>\nLeft: \nRight: \nSame?")]
    with raises_code("record-image-count", message="2 <image> in the conversation, but 3 pictures", kind=DataError):
        place_images([turn], 3)
