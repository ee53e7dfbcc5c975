"""Conversations as supervised and unsupervised segments, by our templates or by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from milora_data.encode.picture_template import TextTemplate
from milora_data.encode.templates import OWN, TEMPLATES, Segment, no_tools, render, template_name
from milora_data.encode.tokens import TokenizerTraits, eos_text, own_template, tokenizer_traits
from milora_data.records.record import IMAGE, Turn
from milora_vl.base.errors import DataError


def segments_of(
    turns: Sequence[Turn],
    template: str,
    tokenizer: Any,
    *,
    prompt: bool = False,
    traits: TokenizerTraits | None = None,
    tools: Sequence[Any] = (),
) -> tuple[list[int], list[Segment]]:
    """Return the ids before the conversation (BOS, or none) and its segments, rendered for `tokenizer`.

    With `prompt`, they end where the next answer begins. Only a chat template writes `tools`, their calls and results.
    Raises `DataError` for turns that the template refuses.
    """
    name = template_name(template)
    bos = tokenizer_traits(tokenizer).bos if traits is None else traits.bos
    text = str(tokenizer.bos_token) if bos else ""
    with_tools = bool(tools) or any(turn.role == "tool" or turn.call for turn in turns)
    if with_tools and name != OWN:
        raise no_tools()
    if name == OWN:
        segments = own_segments(turns, tokenizer, prompt=prompt, tools=tools)
        if with_tools and any(IMAGE in segment.text for segment in segments):
            raise DataError(
                f'a tool, a call or a result contains "{IMAGE}", which stands for a picture',
                code="record-tools-picture",
                hint="remove the marker from the text of the tool",
            )
        return (bos if segments and bos and _processor_adds(text, segments[0].text, tokenizer) else []), segments
    return bos, render(turns, TEMPLATES[name], eos_text(tokenizer), bos=text, prompt=prompt)


def require_template(template: str, tokenizer: Any) -> None:
    """Raise `UserError` for an unknown template, and for the tokenizer's own template if it has none."""
    if template_name(template) == OWN:
        own_template(tokenizer)


def _processor_adds(bos: str, text: str, tokenizer: Any) -> bool:
    """Return whether transformers adds the BOS to the output of the chat template; a processor does, a tokenizer not.

    A tokenizer with an `<image>` token belongs to a processor.
    """
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    return not text.startswith(bos) and image is not None and image != tokenizer.unk_token_id


def own_segments(
    turns: Sequence[Turn], tokenizer: Any, *, prompt: bool = False, tools: Sequence[Any] = ()
) -> list[Segment]:
    """Return the segments of a conversation, with or without tools, in the tokenizer's own chat template.

    Supervised are the assistant's texts and calls with the token that ends each of them, also of earlier turns of a
    `prompt`: their tokens have to be those of the training.
    Raises `UserError` without a chat template, and `DataError` if it refuses the turns, rewrites their texts, or does
    not write the tools.
    """
    form = _chat_template(tokenizer, own_template(tokenizer))
    if prompt:
        rendered = form.render(turns, prompt=True, tools=tools)
        if any(turn.role == "assistant" for turn in turns):
            earlier = form.render(turns, tools=tools)
            if earlier.supervised and not rendered.text.startswith(earlier.text[: earlier.supervised[-1][1]]):
                raise DataError(
                    "the chat template writes an earlier answer of this record in another way before a request",
                    code="chat-template-rewrites-text",
                    hint="use another --template, or split the record before the request",
                )
            rendered = rendered._replace(supervised=earlier.supervised)
    else:
        rendered = form.render(turns, tools=tools)
    segments, at = [], 0
    for start, end in [*rendered.supervised, (len(rendered.text), len(rendered.text))]:
        segments += [Segment(rendered.text[at:start], supervised=False), Segment(rendered.text[start:end], True)]
        at = end
    return [segment for segment in segments if segment.text]


@lru_cache(maxsize=4)
def _chat_template(tokenizer: Any, template: str) -> TextTemplate:
    return TextTemplate(template, tokenizer)  # it runs the template several times, to learn its form
