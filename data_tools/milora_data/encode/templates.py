"""The prompt formats (`--template vicuna_v1`, ...) as data; a conversation's segments; the position of `<image>`.

`vicuna_v1`, `plain` and `mistral` come from LLaVA (llava/conversation.py), `llama_3` from
LLaVA-NeXT, `qwen` and `chatml` from the authors of the models, `alpaca` from Stanford Alpaca (MetaMath, PiSSA and
MiLoRA use it too), `llm_adapters` from LLM-Adapters, `tulu` from open-instruct. `chat_template` is the tokenizer's own
template (chat_template_mask.py). A format works with any tokenizer: it uses the EOS of that tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from milora_data.encode.tokens import bos_ids, eos_text, glue_after, own_template
from milora_data.records.record import IMAGE, Turn
from milora_vl.common.cli.console import amount
from milora_vl.common.errors import DataError, Key, UserError, did_you_mean, suggest

EOS = "{eos}"
OWN = "chat_template"
"""The name for the tokenizer's own chat template, which is not in `TEMPLATES`."""
# Starts the chat template of a model that was trained with it, so that a folder without a recipe is asked in it.
TRAINED_WITH = "{#- The prompt format of the training. #}"


@dataclass(frozen=True, slots=True)
class Template:
    """One prompt format: the system text in its frame, then questions and answers.

    A question is `user[0]` + text + `user[1]`, an answer is `assistant` + `answer[0]` + text + `answer[1]` + `closing`.
    The supervised part is `answer[0]` + text + `answer[1]` ("answers") or the whole conversation ("all").
    """

    user: tuple[str, str]
    assistant: str
    answer: tuple[str, str]
    system: str = ""
    frame: tuple[str, str] = ("", "")  # around the system text; omitted if there is no system text
    system_in_question: bool = False  # put the framed system text into the first question
    closing: str = ""  # after an answer, unsupervised
    between: str = ""  # before each question except the first
    captions: bool = False  # a picture and its caption only: drop the user's text
    supervised: Literal["answers", "all"] = "answers"


class Segment(NamedTuple):
    """A piece of the rendered conversation; the loss is computed on `supervised` pieces."""

    text: str
    supervised: bool


_VISION_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
# What LLaVA-1.5 appends to a question, after a line break, to ask for a short answer or for a letter.
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
_INDENT = " " * 16  # LLM-Adapters' prompt is a triple-quoted string and includes the indentation of its source
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
    "mistral": Template(
        frame=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        system_in_question=True,
        user=("[INST] ", " [/INST]"),
        assistant="",
        answer=(" ", " " + EOS),
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
        system=ALPACA_SYSTEM,
        frame=("", "\n\n"),
        user=("### Instruction:\n", "\n\n"),
        assistant="### Response:",
        answer=("", EOS),
    ),
    "llm_adapters": Template(
        system=ALPACA_SYSTEM,
        frame=("", "  \n\n"),
        user=(f"{_INDENT}### Instruction:\n{_INDENT}", f"\n{_INDENT}\n"),
        assistant=f"{_INDENT}### Response:\n{_INDENT}",
        answer=("", EOS),
        supervised="all",  # finetune.py's train_on_inputs
    ),
    "tulu": Template(
        frame=("<|system|>\n", "\n"),
        user=("<|user|>\n", "\n"),
        assistant="<|assistant|>\n",
        answer=("", EOS),
        between="\n",
    ),
}
# LLaVA and LLaVA-NeXT use these names for --version.
ALIASES = {
    "v1": "vicuna_v1",
    "mistral_instruct": "mistral",
    "llava_llama_3": "llama_3",
    "qwen_1_5": "qwen",
}


def template_name(name: str) -> str:
    """Return the canonical name of a template; raises `UserError` with the known names for an unknown one.

    >>> template_name("llama-3")
    'llama_3'
    """
    plain = name.replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain == OWN or plain in TEMPLATES:
        return plain
    names = [*TEMPLATES, OWN]
    near = suggest(plain, names)
    hint = did_you_mean(near[:1]) or "a run and its chat use the same template; the default is vicuna_v1"
    message = f'unknown template "{name}"; expected one of: {", ".join(names)}'
    raise UserError(message, code="template-unknown", hint=hint)


def get_template(name: str) -> Template:
    """Return the template called `name`; raises `UserError` for an unknown one and for the tokenizer's own."""
    name = template_name(name)
    if name == OWN:
        message = f'the template "{OWN}" is the tokenizer\'s own, but no tokenizer is loaded'
        raise UserError(message, hint="a plan shows records in it:  python -m milora_vl.train --model MODEL --dry-run")
    return TEMPLATES[name]


def render(turns: Sequence[Turn], template: Template, eos: str, *, prompt: bool = False) -> list[Segment]:
    """Return the segments of a conversation; with `prompt`, they end where the next answer begins.

    The segments joined are the text of the conversation, with `<image>` at the position of each picture.
    Raises `DataError` if questions and answers do not alternate, and for tools.
    """
    if any(turn.keys or turn.role in ("tools", "tool") for turn in turns):
        hint = "use --template chat_template with a model whose own template writes tools, or remove them"
        raise DataError("this prompt format has no form for tools and their calls", code="record-tools", hint=hint)
    system, exchange = split_turns(turns)
    text = template.system if system is None else system
    # A format without a default system text has no frame either, unless the record brings a system turn.
    framed = template.frame[0] + text + template.frame[1] if text else ""
    segments = [] if template.system_in_question else [Segment(framed, supervised=False)]
    for number, turn in enumerate(exchange):
        if turn.role == "user":
            first, last = template.user
            first = template.between + first if number else first
            first += framed if template.system_in_question and not number else ""
            segments.append(Segment(first + (IMAGE if template.captions else turn.text) + last, supervised=False))
        else:
            # The role marker is part of the prompt at inference. The text that ends the answer is supervised: the model
            # must learn to stop.
            before, after = template.answer
            segments.append(Segment(template.assistant, supervised=False))
            segments.append(Segment(before + turn.text + after.replace(EOS, eos), supervised=turn.weight == 1))
            segments.append(Segment(template.closing, supervised=False))
    if template.captions:
        _require_caption(exchange, prompt)
    if prompt:
        segments.append(Segment(template.assistant, supervised=False))
    elif template.supervised == "all" and any(segment.supervised for segment in segments):
        if any(turn.weight == 0 for turn in exchange if turn.role == "assistant"):
            message = "this template trains on all of the text, so no answer can be excluded (weight 0, loss false)"
            raise DataError(message, code="record-weight", hint="use another --template, or remove the answer")
        # Without an answer the segments stay unsupervised, so that the record counts as one without supervised tokens.
        return [Segment("".join(segment.text for segment in segments), supervised=True)]
    return [segment for segment in segments if segment.text]


def split_turns(turns: Sequence[Turn]) -> tuple[str | None, list[Turn]]:
    """Return the text of a leading system turn (or None) and the turns that alternate, user first.

    An answer before the first question is dropped, as in LLaVA; so are the definitions of tools, which are no turn.
    Results of tools follow the answer that calls them. Raises `DataError` for another order.
    """
    exchange = [turn for turn in turns if turn.role != "tools"]
    system = exchange.pop(0).text if exchange and exchange[0].role == "system" else None
    if exchange and exchange[0].role == "assistant":
        exchange.pop(0)
    for index, turn in enumerate(exchange):
        before = exchange[index - 1] if index else Turn("assistant", "")
        expected = "assistant" if before.role != "assistant" else "tool" if before.keys else "user"
        if turn.role != expected and not turn.role == before.role == "tool":
            number = len(turns) - len(exchange) + index + 1
            raise DataError(
                f"turn {number} is from {turn.role}, expected {expected}: questions and answers must alternate"
            )
    return system, exchange


def no_videos(name: str, where: str | Key = "") -> DataError:
    hint = "use its frames as pictures, or leave it out"
    return DataError(f"{name} takes no videos", code="record-videos", where=where, hint=hint)


def images_first(turns: Sequence[Turn], num_images: int | None) -> list[Turn]:
    """Return the turns with `<image>` at the start of its turn, followed by a newline.

    This is LLaVA's `preprocess_multimodal` (llava/train/train.py). Several `<image>` of one turn keep their positions,
    as in LLaVA-NeXT. Pass `num_images` None if the number is unknown; raises `DataError` for another number.
    """
    counts = [turn.text.count(IMAGE) for turn in turns]
    if num_images is not None and sum(counts) != num_images:
        raise DataError(
            f"{sum(counts)} {IMAGE} in the conversation, but {amount(num_images, 'picture')} in the record",
            code="record-image-count",
            hint="write <image> once for each picture",
        )
    return [
        replace(turn, text=_in_front(turn.text)) if count == 1 else turn
        for turn, count in zip(turns, counts, strict=True)
    ]


def _in_front(text: str) -> str:
    return (IMAGE + "\n" + text.replace(IMAGE, "").strip()).strip()


def _require_caption(exchange: Sequence[Turn], prompt: bool) -> None:
    if len(exchange) != (1 if prompt else 2) or IMAGE not in exchange[0].text:
        raise DataError(
            f'the template "plain" needs one turn with {IMAGE} and one answer, the caption',
            hint="use another --template; plain is for stage 1, the training of the projector on captions",
        )


def render_chat_template(template: str, tokenizer: Any, *, bos: bool = False) -> str:
    """Return the Jinja chat template for the processor (or tokenizer) that is saved with a model.

    With it, `apply_chat_template` returns exactly the ids of `encode` and `encode_prompt`: same system text, EOS,
    position of pictures, and the blank that LLaVA's tokenization leaves after a picture. Answers are in `generation`
    blocks.

    `bos` puts the BOS into the text. It is for a tokenizer that is saved without a processor: a tokenizer's
    `apply_chat_template` adds no special tokens. A processor adds them, and would add a second BOS.
    Raises `UserError` for an unknown template, a tokenizer without EOS, or a picture token that changes the text
    around it.

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
        "BETWEEN": form.between,
    }
    text = TRAINED_WITH + Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"${name}$", json.dumps(value, ensure_ascii=False))
    # A text that starts with a blank or an added token gets no glue: SentencePiece adds no blank there either.
    alone = [" ", *(token.content for token in tokenizer.added_tokens_decoder.values())]
    text = text.replace("$ALONE$", "(" + "".join(json.dumps(mark, ensure_ascii=False) + "," for mark in alone) + ")")
    return text.replace("$QUESTION$", f"'{IMAGE}'" if form.captions else "content(message)")
