"""The prompts of the paper's text rows: their very characters, ids and targets as the authors' scripts make them."""

from __future__ import annotations

from typing import Any

import pytest

from milora_data.encode.labels import IGNORE, Encoded, encode
from milora_data.encode.templates import TEMPLATES, render
from milora_data.records.record import Turn
from support.llava_oracle import byte_bpe, llama_tokenizer

QUESTION = "Is ice cold?\n\nAnswer format: true/false"
ANSWER = "the correct answer is true"
BLANKS = " " * 16
TEXTS = {
    # AGI-Edgerunners/LLM-Adapters finetune.py, generate_prompt; its two blanks and its line of blanks included.
    "llm_adapters": "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.  \n\n"
    f"{BLANKS}### Instruction:\n{BLANKS}{QUESTION}\n{BLANKS}\n{BLANKS}### Response:\n{BLANKS}{ANSWER}</s>",
    # sufenlp/MiLoRA train.py and GraphPKU/PiSSA train.py, PROMPT; what is learnt follows the colon at once.
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
