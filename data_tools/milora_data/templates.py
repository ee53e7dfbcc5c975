"""Prompt formats as data, and the text of a conversation as segments of which it is known whether they are learnt.

`vicuna_v1` and `plain` are LLaVA's `conv_vicuna_v1` and `conv_llava_plain` (llava/conversation.py), made for Llama;
for other tokenizers the separator `</s>` is their own EOS.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .command import suggest
from .errors import DataError, UserError
from .records import Turn
from .tokens import bos_ids, eos_text, glue_after

IMAGE = "<image>"
EOS = "{eos}"


@dataclass(frozen=True, slots=True)
class Template:
    """One prompt format: `system`, then for each exchange `user[0]` + question + `user[1]` + `assistant` + answer.

    What is learnt of it is the answer: `answer[0]` + text + `answer[1]`.
    """

    system: str
    user: tuple[str, str]
    assistant: str
    answer: tuple[str, str]
    captions: bool = False  # a picture and its caption, nothing else: what the user says is left out


class Segment(NamedTuple):
    """A piece of the rendered conversation; `learnt` pieces are the targets of training."""

    text: str
    learnt: bool


TEMPLATES: dict[str, Template] = {
    "vicuna_v1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        user=("USER: ", " "),
        assistant="ASSISTANT:",
        answer=(" ", EOS),
    ),
    "plain": Template(system="", user=("", ""), assistant="", answer=("", "\n"), captions=True),
}


def get_template(name: str) -> Template:
    """Return the template called `name`; raises `UserError` with the names there are."""
    if name not in TEMPLATES:
        near = suggest(name, TEMPLATES)
        hint = f"\ndid you mean {near[0]} ?" if near else ""
        raise UserError(f'unknown template "{name}"; expected one of: {", ".join(TEMPLATES)}{hint}')
    return TEMPLATES[name]


def render(turns: Sequence[Turn], template: Template, eos: str, *, prompt: bool = False) -> list[Segment]:
    """Return the segments of a conversation; with `prompt`, they end where the next answer begins.

    The text of all segments together is the conversation, with `<image>` where a picture goes.
    Raises `DataError` for turns that are not in order.
    """
    system, exchange = split_turns(turns)
    segments = [Segment(template.system if system is None else system + " ", learnt=False)]
    for turn in exchange:
        if turn.role == "user":
            text = IMAGE if template.captions else turn.text
            segments.append(Segment(template.user[0] + text + template.user[1], learnt=False))
        else:
            before, after = template.answer
            segments.append(Segment(template.assistant, learnt=False))
            segments.append(Segment(before + turn.text + after.replace(EOS, eos), learnt=True))
    if template.captions:
        _require_caption(exchange, prompt)
    if prompt:
        segments.append(Segment(template.assistant, learnt=False))
    return segments


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
    form = get_template(template)
    first = tokenizer.bos_token if bos and bos_ids(tokenizer) else ""
    special = IMAGE if IMAGE in tokenizer.get_vocab() else first
    values = {
        "GLUE": glue_after(special, tokenizer) if special else "",
        "FIRST": first,
        "SYSTEM": form.system,
        "BEFORE": form.user[0],
        "AFTER": form.user[1],
        "ASSISTANT": form.assistant,
        "LEAD": form.answer[0],
        "END": form.answer[1].replace(EOS, eos_text(tokenizer)),
    }
    text = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"${name}$", json.dumps(value, ensure_ascii=False))
    return text.replace("$QUESTION$", f"'{IMAGE}'" if form.captions else "content(message)")
