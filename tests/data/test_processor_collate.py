"""The collator with a model's own processor: ids, masks and tensors equal to transformers', for every family."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers.processors import TemplateProcessing

from milora_data.batches.processor_collator import ProcessorCollator
from milora_data.encode.chat_template_mask import VIDEO_MARK, parts_of
from milora_data.pictures.load import ImageError, Picture
from milora_data.records import ROLES, parse_record
from milora_data.records.record import Record, Turn
from milora_vl.common.compat.transformers import pass_texts_unchanged
from milora_vl.common.errors import DataError
from milora_vl.core.policy.towers import find_towers
from milora_vl.models.losses import add_chunked_loss, record_losses, summed_loss
from support.problems import raises_code
from support.versions import needs_spans
from support.vlm_families import VLM_FAMILIES, model_of, processor_of
from support.vlm_runs import mixed_records, record

pytestmark = [pytest.mark.filterwarnings("ignore"), needs_spans]
LACKS = {"smolvlm": find_spec("num2words") is None}
ALL = [name for name in VLM_FAMILIES if not LACKS.get(name)]
CHATS = [name for name in ALL if name != "paligemma"]
ONE_KIND = ("paligemma",)  # it takes no text without a picture
QUESTION = record([("human", "<image>\nWhat is it?"), ("gpt", "A cat.")], ["0.png"])


@pytest.fixture
def make(pictures: Path) -> Callable[..., ProcessorCollator]:
    def collator(name: str = "qwen2_5_vl", **options: Any) -> ProcessorCollator:
        return ProcessorCollator(processor_of(name), image_folder=pictures, **options)

    return collator


def messages(value: dict[str, Any], pictures: Path) -> list[dict[str, Any]]:
    """Return a record as transformers takes it, with the pictures in their places."""
    names = iter(value.get("image", []))
    out = []
    for turn in value["conversations"]:
        parts = [
            {**part, "image": Image.open(pictures / next(names)).convert("RGB")} if part["type"] == "image" else part
            for part in parts_of(turn["value"])
        ]
        out.append({"role": ROLES[turn["from"]], "content": parts})
    return out


def supervised(collator: ProcessorCollator, batch: dict[str, Any]) -> list[str]:
    return [collator.inputs.tokenizer.decode(row[row != -100]) for row in batch["labels"]]


@pytest.mark.parametrize("name", [name for name in CHATS if name != "glm4v"])
def test_ids_masks_and_tensors_equal_those_of_transformers(name: str, make: Any, pictures: Path) -> None:
    values = mixed_records(single=name == "mllama")  # its processor refuses mixed batches
    collator = make(name)
    batch = collator(values)
    expected = collator.inputs.processor.apply_chat_template(
        [messages(value, pictures) for value in values],
        chat_template=VLM_FAMILIES[name].template,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    mask = expected.pop("assistant_masks").bool() & expected["attention_mask"].bool()
    expected["labels"] = expected["input_ids"].where(mask, -100)
    assert list(batch)[:3] == ["input_ids", "attention_mask", "labels"]
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["gemma3", "mllama"])
def test_a_template_that_writes_the_bos_gets_no_second_one(name: str, pictures: Path) -> None:
    """The published tokenizers of these families put a BOS before every text by themselves."""
    processor = processor_of(name)
    bos = processor.tokenizer.bos_token
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, processor.tokenizer.bos_token_id)]
    )
    assert processor.tokenizer("a")["input_ids"].count(processor.tokenizer.bos_token_id) == 1
    collator = ProcessorCollator(processor, image_folder=pictures)
    expected = processor.apply_chat_template(
        messages(QUESTION, pictures), tokenize=True, return_dict=True, return_tensors="pt"
    )
    batch = collator([QUESTION])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert supervised(collator, batch) == ["A cat." + str(collator.inputs.format.end)]
    assert collator.num_tokens(parse_record(QUESTION)) == batch["input_ids"].shape[1]


@pytest.mark.parametrize("name", ALL)
def test_the_loss_is_the_models_own(name: str, make: Any) -> None:
    collator = make(name)
    batch = collator(mixed_records(single=name in ONE_KIND)[:4])
    model = model_of(name, collator.inputs.processor)
    with torch.no_grad():
        own = model(**batch).loss
        summed, count = summed_loss(model, batch, chunked=add_chunked_loss(model))
    assert count > 10
    assert torch.allclose(summed / count, own, rtol=1e-5)


def test_the_loss_of_each_record_is_that_of_the_record_alone(make: Any) -> None:
    """Batches of two, with and without a picture; a record without an answer has no loss."""
    collate, model = make(), model_of("qwen2_5_vl", processor_of("qwen2_5_vl")).eval()
    rows = [
        record([("human", "<image>\nWhat?"), ("gpt", "A cat.")], ["0.png"]),
        record([("human", "Hi?"), ("gpt", "Hello.")], []),
        record([("human", "Hi?")], []),
        record([("human", "<image>\nWhich?"), ("gpt", "That one.")], ["1.png"]),
    ]
    found = record_losses(model, collate, map(parse_record, rows), 2)
    assert [pair[0].turns[1].text for pair in found] == ["Hello.", "A cat.", "That one."]
    for value, loss in found:
        with torch.no_grad():
            summed, count = summed_loss(model, collate([value]), chunked=False)
        assert loss == pytest.approx(float(summed) / count, abs=1e-4)


def test_a_plain_prompt_gives_what_the_processor_makes_of_question_and_answer(make: Any, pictures: Path) -> None:
    collator = make("paligemma")
    batch = collator([QUESTION])
    picture = Image.open(pictures / "0.png").convert("RGB")
    expected = collator.inputs.processor(
        text=["<image>What is it?"], suffix=["A cat."], images=[[picture]], return_tensors="pt"
    )
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert supervised(collator, batch) == ["A cat.<eos>"]
    for turns in ([("human", "Hi"), ("gpt", "Yes")], [*[("human", "a"), ("gpt", "b")] * 2]):
        with pytest.raises(DataError) as error:
            collator([record(turns, [])])
        assert error.value.first.code == "record-not-one-question"


@pytest.mark.parametrize("name", [name for name in CHATS if name not in ("pixtral", "aya_vision")])
def test_lengths_need_no_pixels_and_are_exact(name: str, make: Any) -> None:
    collator = make(name)
    for value in [value for value in mixed_records() if len(value.get("image", [])) < 2]:
        assert collator.num_tokens(parse_record(value)) == collator([value])["input_ids"].shape[1]


# What a family supervises of an answer: its template strips some answers, or writes a blank before them.
ANSWERS: dict[str, Callable[[str], str]] = {
    "qwen2_vl": lambda text: f"{text}<|im_end|>",
    "qwen2_5_vl": lambda text: f"{text}<|im_end|>",
    "qwen3_vl": lambda text: f"{text}<|im_end|>",
    "qwen3_5": lambda text: f"{text.strip()}<|im_end|>",
    "gemma4": lambda text: f"{text.strip()}<turn|>",
    "internvl": lambda text: f"{text}<|im_end|>",
    "llava_onevision": lambda text: f"{text}<|im_end|>",
    "gemma3": lambda text: f"{text.strip()}<end_of_turn>",
    "idefics3": lambda text: f" {text}<end_of_utterance>",
    "mistral3": lambda text: f"{text}</s>",
    "pixtral": lambda text: f"{text}</s>",
    "mllama": lambda text: f"{text}<|eot_id|>",
    "glm4v": lambda text: text,
    "aya_vision": lambda text: f"{text}<|END_OF_TURN_TOKEN|>",
}
SPECIAL = ["<|im_end|>", "<|im_start|>user\n", "<end_of_turn>", "<end_of_utterance>", "[INST]", "</s>", "<s>", "<pad>"]
BLANKS = ["", " ", "\n", "\u3000", " two  words \n", "\n\n* a\n", "\t"]
UNUSUAL = ["漢字🙂", "e\u0301", "\u202eab", "{{ x }}", "{% if %}", "\\n", "\ue002", "\ue0000\ue001"]
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from([*SPECIAL, *BLANKS, *UNUSUAL]),
    st.tuples(st.sampled_from(SPECIAL), st.text(max_size=3)).map("".join),
).filter(
    lambda text: (
        not any(mark in text for mark in ("<image>", VIDEO_MARK))
        and not any("\ud800" <= char <= "\udfff" for char in text)
    )
)
SIDE = st.integers(8, 70)
PIECE = st.one_of(TEXTS, st.tuples(SIDE, SIDE))  # a text, or a picture of a width and height
TURN = st.lists(PIECE, min_size=1, max_size=4)


def picture(width: int, height: int) -> Picture:
    file = BytesIO()
    Image.new("RGB", (width, height), (width, height, 90)).save(file, "PNG")
    return Picture(f"{width}x{height}.png", content=file.getvalue())


@pytest.mark.parametrize("name", ANSWERS)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(turns=st.lists(st.tuples(TURN, TEXTS), min_size=1, max_size=3), system=st.one_of(st.none(), TEXTS))
def test_what_is_supervised_decodes_to_exactly_the_answers(
    name: str, turns: list[tuple[list[str | tuple[int, int]], str]], system: str | None, make: Any
) -> None:
    pictures, exchange = [], [] if system is None else [Turn("system", system)]
    for parts, answer in turns:
        kept: list[str] = []
        for part in parts:
            if isinstance(part, str):
                kept.append(part)
            elif len(pictures) < 4:
                pictures.append(picture(*part))
                kept.append("<image>\n")
        exchange += [Turn("user", "".join(kept)), Turn("assistant", answer)]
    if name not in COLLATORS:
        COLLATORS[name] = make(name)
    batch = COLLATORS[name]([Record("r", tuple(pictures), tuple(exchange))])
    (text,) = supervised(COLLATORS[name], batch)
    end = "<|endoftext|>" if name == "glm4v" else ""  # its template has no end token: the EOS follows the last answer
    assert text == "".join(ANSWERS[name](answer) for _, answer in turns) + end
    assert ("pixel_values" in batch) == bool(pictures)
    if name == "qwen2_5_vl" and pictures:
        assert len(batch["image_grid_thw"]) == len(pictures)


COLLATORS: dict[str, ProcessorCollator] = {}  # hypothesis calls the test with one fixture


def test_a_picture_in_an_answer_is_not_supervised(make: Any) -> None:
    collator = make()
    batch = collator([record([("human", "Draw."), ("gpt", "Here: <image>\nDone.")], ["0.png"])])
    assert supervised(collator, batch) == ["Here: <|vision_start|><|vision_end|>Done.<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "idefics3", "mllama"])
def test_max_length_cuts_no_picture_in_two(name: str, make: Any) -> None:
    turns = [("human", "<image>\nA?"), ("gpt", "One."), ("human", "<image>\nB?"), ("gpt", "Two.")]
    value = record(turns, ["1.png", "0.png"])
    whole = make(name)([value])["input_ids"][0].tolist()
    first = make(name)([record(turns[:2], ["1.png"])])["input_ids"].shape[1]
    model, lengths = None, []
    for length in range(len(whole) - 1, first, -3):
        collator = make(name, max_length=length)
        batch = collator([value, record([("human", "<image>\nC?"), ("gpt", "1")], ["2.png"])])
        kept = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
        assert kept == whole[: len(kept)]
        assert length - 40 < len(kept) <= length
        assert collator.counts()["cut"] >= 1
        model = model or model_of(name, collator.inputs.processor)
        model(**batch)  # raises unless there are as many pictures as the ids show
        lengths.append(len(kept))
    assert len(set(lengths)) > 4


@pytest.fixture
def bad(pictures: Path) -> dict[str, dict[str, Any]]:
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:40])
    Image.new("RGB", (1, 400)).save(pictures / "thin.png")  # Qwen-VL takes no ratio above 200
    return {name: QUESTION | {"id": name, "image": [f"{name}.png"]} for name in ("cut", "thin", "missing")}


def test_a_batch_without_usable_records_takes_only_a_usable_substitute(make: Any, bad: Any) -> None:
    """A substitute that the processor refuses, or without an answer, once made the collator loop."""
    long = record([("human", "long " * 30), ("gpt", "never reached")], [])
    good = make()([QUESTION])
    for unusable in (bad["thin"], long):
        collate = make(bad_images="skip", max_length=70, substitutes=[bad["thin"], long, QUESTION])
        batch = collate([unusable])
        assert all(torch.equal(batch[key], good[key]) for key in good)
        assert sum(collate.counts().values()) == 1
        with raises_code("", message="every record of the first batch"):
            make(bad_images="skip", max_length=70, substitutes=[unusable])([unusable])


@pytest.mark.parametrize("name", ["cut", "thin", "missing"])
def test_a_picture_that_cannot_be_used_stops_or_is_skipped(name: str, make: Any, bad: Any) -> None:
    with pytest.raises(ImageError) as error:
        make()([QUESTION, bad[name]])
    assert f"{name}.png" in str(error.value)
    assert f"needed by record {name!r}; --bad_images skip" in error.value.first.hint
    skip = make(bad_images="skip")
    good = make()([QUESTION])
    batch = skip([QUESTION, bad[name]])
    assert all(torch.equal(batch[key], good[key]) for key in good)
    assert skip.counts()["skipped"] == 1
    again = skip([bad[name]])  # nothing is left: the last good record is repeated
    assert all(torch.equal(again[key], good[key]) for key in good)


@pytest.mark.parametrize(
    ("turns", "images", "code"),
    [
        ([("human", "<image>\n<image>\nA?"), ("gpt", "B")], ["0.png", "1.png", "2.png"], "record-image-count"),
        ([("human", "<image>\n<image>\nA?"), ("gpt", "B")], ["0.png"], "record-image-count"),
        ([("human", "A?"), ("gpt", "B")], ["0.png"], "record-image-count"),
        ([("human", "<image>\nA?"), ("gpt", "B"), ("human", "<image>"), ("gpt", "B")], ["0.png"], "record-image-count"),
        ([("human", "<image>\nA <|image_pad|>?"), ("gpt", "B")], ["0.png"], "record-image-token-in-text"),
        ([("human", "<image>\nA?")], ["0.png"], "record-no-answer"),
    ],
)
def test_a_record_that_does_not_fit_is_named(turns: Any, images: list[str], code: str, make: Any) -> None:
    collator = make()
    value = Record("r", tuple(map(Picture, images)), parse_record(record(turns, images)).turns, source="data.json:7")
    with pytest.raises(DataError) as error:
        collator.num_tokens(value)
    assert (error.value.first.code, error.value.first.where) == (code, "data.json:7")


def test_a_processor_without_a_chat_template_is_refused() -> None:
    processor = processor_of("qwen2_5_vl")
    processor.chat_template = None
    with raises_code("processor-no-chat-template", message="Qwen2_5_VLProcessor has no chat template") as error:
        ProcessorCollator(processor)
    assert "chat_template.jinja" in error.value.first.hint


def test_what_a_template_writes_for_other_texts_is_not_reused_for_this_one(make: Any) -> None:
    """The template is run with placeholders once per form of conversation; here it depends on the texts."""
    processor = processor_of("qwen2_5_vl")
    processor.chat_template = processor.chat_template.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m.content[0].text | length > 8 %}<|im_start|>long<|im_end|>{% endif %}",
    )
    collator = ProcessorCollator(processor)
    turns = [("human", "A?"), ("gpt", "B"), ("human", "A longer question?"), ("gpt", "C")]
    short, long, again = ([*turns[:2]], turns, [turns[2], turns[1], *turns[:2]])
    for exchange in (short, long, again, long):
        batch = collator([record(exchange, [])])
        answers = [text for who, text in exchange if who == "gpt"]
        assert supervised(collator, batch) == ["".join(f"{answer}<|im_end|>" for answer in answers)]
        assert ("long" in collator.inputs.tokenizer.decode(batch["input_ids"][0])) == (exchange is not short)


TEXTS = [record([("human", "A?"), ("gpt", answer)], []) for answer in ("B", "A much longer answer")]


@pytest.mark.parametrize("name", [name for name in CHATS if name != "smolvlm"])
def test_a_hidden_picture_uses_the_tower_and_changes_no_loss(name: str, make: Any, monkeypatch: Any) -> None:
    alone = make(name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    together = make(name)
    model = model_of(name, alone.inputs.processor).eval()
    pass_texts_unchanged(model)
    plain = model(**alone(TEXTS)).loss
    model.zero_grad()
    loss = model(**together(TEXTS)).loss
    assert torch.equal(loss, plain) or torch.allclose(loss, plain, rtol=1e-6)
    loss.backward()
    roots = find_towers(model).roots
    for tower, uses in (("projector", all), ("vision", any)):  # towers have layers behind those that are read
        grads = [p.grad for path in roots[tower] for p in model.get_submodule(path).parameters()]
        assert uses(grad is not None for grad in grads), tower
        assert not any(grad.abs().max() for grad in grads if grad is not None)


def test_texts_beside_pictures_pass_cross_attention_unchanged(make: Any) -> None:
    """transformers lets a text without a picture attend to the padding of its row."""
    collator = make("mllama")
    model = model_of("mllama", collator.inputs.processor).eval()
    with torch.no_grad():
        for name, gate in model.named_parameters():
            gate.fill_(0.7) if name.endswith("_gate") else None
        pass_texts_unchanged(model)
        alone = [model(**collator([value])).logits[0] for value in (QUESTION, *TEXTS)]
        for order in ((0, 1, 2), (2, 0, 1)):
            rows = model(**collator([(QUESTION, *TEXTS)[index] for index in order])).logits
            for row, index in zip(rows, order, strict=True):
                torch.testing.assert_close(row[: len(alone[index])], alone[index])
