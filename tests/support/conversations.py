"""Conversations, drawn at random or recorded, and ids and labels in LLaVA's own form."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st
from transformers import AddedToken

from milora_data.encode.labels import IGNORE, encode
from milora_data.records.record import IMAGE
from support.llava_oracle import byte_bpe

KINDS = ("legacy", "new", "prepend")


def record(*texts: str, images: int = 0) -> dict[str, Any]:
    """A record whose turns alternate, question first."""
    turns = [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]
    return {"id": "r", "conversations": turns} | ({"image": [f"{i}.png" for i in range(images)]} if images else {})


def as_llava(value: dict[str, Any], tokenizer: Any, template: str = "vicuna_v1") -> tuple[list[int], list[int]]:
    """Our ids and labels in LLaVA's own form. LLaVA never compares the number of pictures; we are given as many."""
    if "image" in value:
        value = value | {"image": ["a.jpg"] * sum(IMAGE in turn["value"] for turn in value["conversations"])}
    made = encode(value, tokenizer, template=template, image_token_id=-200, image_tokens=1)
    return made.input_ids, made.labels


def supervised_text(made: Any, tokenizer: Any) -> str:
    """The targets as text."""
    return tokenizer.decode([label for label in made.labels if label != IGNORE])


texts = st.text(alphabet=st.sampled_from("aeT .,:!?\n\t  é中🐱▁<>/s\u00a0'\"0189"), max_size=30) | st.text(max_size=20)

# Well-formed: no blank turn (LLaVA drops the separator then), nothing that LLaVA's own splitting trips over.
answers = texts.filter(lambda text: text and IMAGE not in text and "ASSISTANT" not in text and "<unk>" not in text)


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """Well-formed LLaVA records, some with a picture at any index of any question."""
    exchanges = draw(st.lists(st.tuples(answers, answers), min_size=1, max_size=4))
    turns = [text for exchange in exchanges for text in exchange]
    assume(all(text.encode("utf-8", "replace").decode() == text and "\x00" not in text for text in turns))
    assume(not any(special in text for text in turns for special in ("</s>", "<s>")))
    if not draw(st.booleans()):
        return record(*turns)
    index = 2 * draw(st.integers(0, len(exchanges) - 1))
    at = draw(st.integers(0, len(turns[index])))
    turns[index] = turns[index][:at] + IMAGE + turns[index][at:]
    return record(*turns, images=1)


MARKS = ("</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")


def with_marks(eos: str = "</s>") -> Any:
    """A byte-level BPE tokenizer that knows the marks of all formats, as Qwen's and Llama 3's do."""
    tokenizer = copy.deepcopy(byte_bpe())
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS], special_tokens=True)
    tokenizer.eos_token = eos
    return tokenizer


BYTE_BPE = with_marks()
