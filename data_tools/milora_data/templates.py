"""Prompt formats as data, and the text of a conversation as segments of which it is known whether they are learnt.

`vicuna_v1`, `plain`, `llava_llama_2`, `mpt` and `mistral` are LLaVA's own (llava/conversation.py), `llama_3` is
LLaVA-NeXT's, `qwen` and `chatml` are those of the models' makers, `alpaca` is Stanford Alpaca's (MetaMath, PiSSA and
MiLoRA have it too), `llm_adapters` LLM-Adapters', `tulu` open-instruct's. `chat_template` is whatever the tokenizer
brings (own_template.py). Made for one tokenizer, they hold for others: EOS and BOS are those of the tokenizer at hand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from milora_data.command import suggest
from milora_data.errors import DataError, UserError
from milora_data.records import Turn
from milora_data.tokens import bos_ids, bos_text, eos_text, glue_after, own_template

IMAGE = "<image>"
EOS, BOS = "{eos}", "{bos}"
OWN = "chat_template"
"""The name of the template that is none of ours: the tokenizer's."""


@dataclass(frozen=True, slots=True)
class Template:
    """One prompt format: the system text in its frame, then questions and answers.

    A question is `user[0]` + text + `user[1]`, an answer `assistant`, `answer[0]` + text + `answer[1]`, `closing`.
    What is learnt of it is the answer, `answer[0]` + text + `answer[1]`, or all of it.
    """

    user: tuple[str, str]
    assistant: str
    answer: tuple[str, str]
    system: str = ""
    frame: tuple[str, str] = ("", "")  # around the system text; without one it is left out
    system_in_question: bool = False  # the framed system text stands within the first question
    closing: str = ""  # behind an answer, not learnt
    between: str = ""  # in front of every question but the first
    captions: bool = False  # a picture and its caption, nothing else: what the user says is left out
    learnt: Literal["answers", "all"] = "answers"


class Segment(NamedTuple):
    """A piece of the rendered conversation; `learnt` pieces are the targets of training."""

    text: str
    learnt: bool


_VISION_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_INDENT = " " * 16  # of LLM-Adapters' source, within whose function the text stands
TEMPLATES: dict[str, Template] = {
    "vicuna_v1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        frame=("", " "),
        user=("USER: ", " "),
        assistant="ASSISTANT:",
        answer=(" ", EOS),
    ),
    "plain": Template(user=("", ""), assistant="", answer=("", "\n"), captions=True),
    "llava_llama_2": Template(
        system=_VISION_SYSTEM,
        frame=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        system_in_question=True,
        user=("[INST] ", " [/INST]"),
        assistant="",
        answer=(" ", " " + EOS),
        between=BOS,
    ),
    "mistral": Template(
        frame=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        system_in_question=True,
        user=("[INST] ", " [/INST]"),
        assistant="",
        answer=(" ", " " + EOS),
    ),
    "mpt": Template(
        system="A conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers.",
        frame=("<|im_start|>system\n", "<|im_end|>"),
        user=("<|im_start|>user\n", "<|im_end|>"),
        assistant="<|im_start|>assistant\n",
        answer=("", "<|im_end|>"),
    ),
    "chatml": Template(
        frame=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant="<|im_start|>assistant\n",
        answer=("", "<|im_end|>"),
        closing="\n",
    ),
    "qwen": Template(
        system="You are a helpful assistant.",
        frame=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant="<|im_start|>assistant\n",
        answer=("", "<|im_end|>"),
        closing="\n",
    ),
    "llama_3": Template(
        system=_VISION_SYSTEM,
        frame=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer=("", "<|eot_id|>"),
    ),
    "alpaca": Template(
        system=_ALPACA_SYSTEM,
        frame=("", "\n\n"),
        user=("### Instruction:\n", "\n\n"),
        assistant="### Response:",
        answer=("", EOS),
    ),
    "llm_adapters": Template(
        system=_ALPACA_SYSTEM,
        frame=("", "  \n\n"),
        user=(f"{_INDENT}### Instruction:\n{_INDENT}", f"\n{_INDENT}\n"),
        assistant=f"{_INDENT}### Response:\n{_INDENT}",
        answer=("", EOS),
        learnt="all",  # finetune.py's train_on_inputs
    ),
    "tulu": Template(
        frame=("<|system|>\n", "\n"),
        user=("<|user|>\n", "\n"),
        assistant="<|assistant|>\n",
        answer=("", EOS),
        between="\n",
    ),
}
# LLaVA's and LLaVA-NeXT's names for --version.
ALIASES = {
    "v1": "vicuna_v1",
    "llama_2": "llava_llama_2",
    "mistral_instruct": "mistral",
    "llava_llama_3": "llama_3",
    "llama3": "llama_3",
    "qwen_1_5": "qwen",
    "qwen_2": "qwen",
    "qwen2": "qwen",
}


def template_name(name: str) -> str:
    """Return the name of a template as we spell it, for any of its names; raises `UserError` with those there are.

    >>> template_name("llama-3")
    'llama_3'
    """
    plain = name.replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain == OWN or plain in TEMPLATES:
        return plain
    names = [*TEMPLATES, OWN]
    near = suggest(plain, names)
    hint = f"\ndid you mean {near[0]} ?" if near else ""
    raise UserError(f'unknown template "{name}"; expected one of: {", ".join(names)}{hint}')


def get_template(name: str) -> Template:
    """Return the template called `name`; raises `UserError` for an unknown one and for the tokenizer's own."""
    name = template_name(name)
    if name == OWN:
        raise UserError(f'the template "{OWN}" is the tokenizer\'s own, and there is none here\nname a tokenizer')
    return TEMPLATES[name]


def render(
    turns: Sequence[Turn], template: Template, eos: str, *, bos: str = "", prompt: bool = False
) -> list[Segment]:
    """Return the segments of a conversation; with `prompt`, they end where the next answer begins.

    The text of all segments together is the conversation, with `<image>` where a picture goes.
    Raises `DataError` for turns that are not in order.
    """
    system, exchange = split_turns(turns)
    text = template.system if system is None else system
    framed = template.frame[0] + text + template.frame[1] if text else ""
    segments = [] if template.system_in_question else [Segment(framed, learnt=False)]
    for number, turn in enumerate(exchange):
        if turn.role == "user":
            first, last = template.user
            first = template.between.replace(BOS, bos) + first if number else first
            first += framed if template.system_in_question and not number else ""
            segments.append(Segment(first + (IMAGE if template.captions else turn.text) + last, learnt=False))
        else:
            before, after = template.answer
            segments.append(Segment(template.assistant, learnt=False))
            segments.append(Segment(before + turn.text + after.replace(EOS, eos), learnt=True))
            segments.append(Segment(template.closing, learnt=False))
    if template.captions:
        _require_caption(exchange, prompt)
    if prompt:
        segments.append(Segment(template.assistant, learnt=False))
    elif template.learnt == "all" and any(segment.learnt for segment in segments):
        return [Segment("".join(segment.text for segment in segments), learnt=True)]
    return [segment for segment in segments if segment.text]


def split_turns(turns: Sequence[Turn]) -> tuple[str | None, list[Turn]]:
    """Return the text of a leading system turn (or None) and the turns that alternate, user first.

    An answer before the first question is left out, as LLaVA does.
    Raises `DataError` where two turns of one role follow each other.
    """
    rest = list(turns)
    system = rest.pop(0).text if rest and rest[0].role == "system" else None
    if rest and rest[0].role == "assistant":
        rest.pop(0)
    for number, turn in enumerate(rest):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            place = len(turns) - len(rest) + number + 1
            raise DataError(
                f"turn {place} is from {turn.role}, expected {expected}: questions and answers must alternate"
            )
    return system, rest


def place_images(turns: Sequence[Turn], num_images: int | None) -> list[Turn]:
    """Return the turns with `<image>` where LLaVA puts it: in front of its turn, followed by a newline.

    This is `preprocess_multimodal` (llava/train/train.py). Several in one turn become one by that rule; if the record
    has a picture for each, they stay where they are, as in LLaVA-NeXT. `num_images` None: not known.
    Raises `DataError` where the number of placeholders fits neither rule.
    """
    counts = [turn.text.count(IMAGE) for turn in turns]
    several = num_images is None or sum(counts) == num_images
    if not several and sum(count > 0 for count in counts) != num_images:
        raise DataError(f"{sum(counts)} {IMAGE} in the conversation, but {num_images} pictures in the record")
    return [
        turn if count == 0 or (several and count > 1) else Turn(turn.role, _in_front(turn.text))
        for turn, count in zip(turns, counts, strict=True)
    ]


def _in_front(text: str) -> str:
    return (IMAGE + "\n" + text.replace(IMAGE, "").strip()).strip()


def _require_caption(exchange: Sequence[Turn], prompt: bool) -> None:
    if len(exchange) != (1 if prompt else 2) or IMAGE not in exchange[0].text:
        raise DataError(f'the template "plain" needs one turn with {IMAGE} and one answer, the caption')


def render_chat_template(template: str, tokenizer: Any, *, bos: bool = False) -> str:
    """Return the Jinja chat template for the processor (or tokenizer) that is saved beside a model.

    With it, `apply_chat_template` gives exactly the ids of `encode` and `encode_prompt`: system text, EOS, the place of
    pictures, and the blank that LLaVA's tokenizing leaves behind a picture. Answers stand in `generation` blocks.

    `bos` puts the BOS into the text, for a tokenizer that is saved without a processor: its `apply_chat_template` adds
    no special tokens, while a processor does (and so does `processor(text=...)`, which would then have two).
    Raises `UserError`: unknown template, no EOS, a picture token that changes the text around it.

    >>> processor.chat_template = render_chat_template("vicuna_v1", processor.tokenizer)  # doctest: +SKIP
    """
    if template_name(template) == OWN:
        return own_template(tokenizer)
    form = get_template(template)
    first = tokenizer.bos_token if bos and bos_ids(tokenizer) else ""
    special = IMAGE if IMAGE in tokenizer.get_vocab() else first
    values = {
        "GLUE": glue_after(special, tokenizer) if special else "",
        "FIRST": first,
        "SYSTEM": form.system,
        "OPEN": form.frame[0],
        "CLOSE": form.frame[1],
        "INSIDE": form.system_in_question,
        "BEFORE": form.user[0],
        "AFTER": form.user[1],
        "ASSISTANT": form.assistant,
        "LEAD": form.answer[0],
        "END": form.answer[1].replace(EOS, eos_text(tokenizer)),
        "BEHIND": form.closing,
        "BETWEEN": form.between.replace(BOS, bos_text(tokenizer)),
    }
    text = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"${name}$", json.dumps(value, ensure_ascii=False))
    # Nothing is put in front of a text that starts with a blank or with a token of its own.
    alone = [" ", *(token.content for token in tokenizer.added_tokens_decoder.values())]
    text = text.replace("$ALONE$", "(" + "".join(json.dumps(mark, ensure_ascii=False) + "," for mark in alone) + ")")
    return text.replace("$QUESTION$", f"'{IMAGE}'" if form.captions else "content(message)")
