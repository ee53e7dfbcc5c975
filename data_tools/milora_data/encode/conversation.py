"""Conversations as supervised and unsupervised segments, by our templates or by the tokenizer's chat template.

A chat template is a Jinja program that returns one text and does not mark the answers. To find them, it is run with
placeholders as contents; the text is split at the placeholders, and the real contents are inserted. The result is
compared with the template's output for the real contents, so a wrong loss mask is an error and never silent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from milora_data.encode.picture_template import PictureTemplate
from milora_data.encode.templates import OWN, TEMPLATES, Segment, no_tools, render, split_turns, template_name
from milora_data.encode.tokens import TokenizerTraits, eos_text, own_template, tokenizer_traits
from milora_data.records.record import IMAGE, Turn
from milora_vl.base.errors import MALFORMED, DataError

_PLACEHOLDER = "\ue000{}\ue001"  # characters of Unicode's private use area: no template handles them specially
_PLACEHOLDERS = re.compile("\ue000([0-9]+)\ue001")


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
        segments = (
            tool_segments(turns, tools, tokenizer, prompt=prompt)
            if with_tools
            else own_segments(turns, tokenizer, prompt=prompt)
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


def own_segments(turns: Sequence[Turn], tokenizer: Any, *, prompt: bool = False) -> list[Segment]:
    """Return the segments of a conversation in the tokenizer's own chat template.

    The supervised part is what the model has to write: everything after the text that asks for an answer, up to and
    including the special token that ends the answer. If the template has no such token, the text that it puts after an
    answer is supervised instead, and an EOS at the end of the conversation.
    Raises `UserError` without a chat template, and `DataError` if it refuses the turns or rewrites their texts.
    """
    own_template(tokenizer)
    system, exchange = split_turns(turns)
    kept = ([] if system is None else [Turn("system", system)]) + list(exchange)
    template = _ChatTemplate(tokenizer, kept)
    end, has_token = template.end_of_answer()
    generation_prompt = template.question_to_answer()
    segments: list[Segment] = []
    for turn, (before, content, after) in zip(kept, template.parts(prompt), strict=True):
        supervised = turn.role == "assistant"
        # The answer ends with its special token; text after that (often a newline) starts the next turn.
        tail = re.match(end, after)
        cut = tail.end() if supervised and tail else 0
        # At inference the prompt ends with the generation prompt. If the template writes more than that before an
        # answer (such as an empty block of thoughts), the model has to write it: it is supervised.
        start = len(generation_prompt) if supervised and before.startswith(generation_prompt) else len(before)
        segments += [
            Segment(before[:start], supervised=False),
            Segment(before[start:] + content + after[:cut], supervised),
            Segment(after[cut:], supervised=False),
        ]
    if "".join(segment.text for segment in segments) != template.run([turn.text for turn in kept], prompt):
        raise DataError(
            "the tokenizer's chat template rewrites a text of this record, so the supervised part is unknown",
            code="chat-template-rewrites-text",
            hint="use another --template",
        )
    if not has_token and not prompt and kept and kept[-1].role == "assistant":
        segments.append(Segment(eos_text(tokenizer), supervised=True))
    return [segment for segment in segments if segment.text]


def tool_segments(
    turns: Sequence[Turn], tools: Sequence[Any], tokenizer: Any, *, prompt: bool = False
) -> list[Segment]:
    """Return the segments of a conversation with tools in the tokenizer's own chat template.

    Supervised are the assistant's texts and calls with the token that ends each of them, also of earlier turns of a
    `prompt`: their tokens have to be those of the training.
    Raises `UserError` without a chat template, and `DataError` if it refuses the turns or does not write the tools.
    """
    form = _template_with_tools(tokenizer, own_template(tokenizer))
    rendered = form.render(turns, tools=tools)
    if prompt:
        earlier, rendered = rendered, form.render(turns, prompt=True, tools=tools)
        if earlier.supervised and not rendered.text.startswith(earlier.text[: earlier.supervised[-1][1]]):
            raise DataError(
                "the model's chat template writes an earlier answer of this record in another way before a request",
                code="chat-template-rewrites-text",
                hint="use another --template, or split the record before the request",
            )
        rendered = rendered._replace(supervised=earlier.supervised)
    if IMAGE in rendered.text:
        raise DataError(
            f'a tool, a call or a result contains "{IMAGE}", which stands for a picture',
            code="record-tools-picture",
            hint="remove the marker from the text of the tool",
        )
    segments, at = [], 0
    for start, end in [*rendered.supervised, (len(rendered.text), len(rendered.text))]:
        segments += [Segment(rendered.text[at:start], supervised=False), Segment(rendered.text[start:end], True)]
        at = end
    return [segment for segment in segments if segment.text]


@lru_cache(maxsize=4)
def _template_with_tools(tokenizer: Any, template: str) -> PictureTemplate:
    return PictureTemplate(template, tokenizer)  # it runs the template several times, to learn its form


class _ChatTemplate:
    """The tokenizer's chat template for given turns, whose contents can be replaced."""

    def __init__(self, tokenizer: Any, turns: Sequence[Turn]) -> None:
        self.tokenizer, self.turns = tokenizer, list(turns)
        self.in_parts = False  # contents are lists of parts, as templates of vision models expect
        self.blanks = [_blanks(turn.text) for turn in turns]
        self.placeholders = [_PLACEHOLDER.format(number) for number in range(len(turns))]
        # Templates do not declare which form of content they take: try text first, then parts.
        try:
            self.in_parts = len(_PLACEHOLDERS.findall(self.run(self.placeholders))) < len(turns)
        except DataError as error:
            self.in_parts = True
            try:
                self.run(self.placeholders)
            except DataError:
                raise error from None

    def run(self, texts: Sequence[str], prompt: bool = False) -> str:
        """Return the template's output for the first turns, with `texts` as their contents."""
        from jinja2 import TemplateError

        messages = [
            {"role": turn.role, "content": [{"type": "text", "text": text}] if self.in_parts else text}
            for turn, text in zip(self.turns, texts, strict=False)
        ]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
        except (TemplateError, *MALFORMED) as error:
            raise DataError(
                f"the tokenizer's chat template refuses this conversation: {error}",
                code="chat-template-refuses",
                hint="change the record, or use another --template",
            ) from None

    def parts(self, prompt: bool = False, count: int | None = None) -> list[tuple[str, str, str]]:
        """Return for each turn the text before its content, the content, and the text after it.

        The text between two contents is returned once: after an answer, before any other turn.
        """
        placeholders, blanks = self.placeholders[:count], self.blanks[:count]
        bare = _PLACEHOLDERS.split(self.run(placeholders, prompt))[::2]
        # Some templates strip the contents. A second run, with the blanks of the real texts, shows which blanks stay.
        with_blanks = [first + text + last for text, (first, last) in zip(placeholders, blanks, strict=True)]
        gaps = _PLACEHOLDERS.split(self.run(with_blanks, prompt))[::2]
        if not len(bare) == len(gaps) == len(placeholders) + 1:
            raise DataError(
                "the tokenizer's chat template omits or repeats a text of this record",
                code="chat-template-rewrites-text",
                hint="use another --template",
            )
        kept = [
            _kept_blanks(gap, plain, after, before)
            for gap, plain, after, before in zip(
                gaps, bare, ["", *(last for _, last in blanks)], [*(first for first, _ in blanks), ""], strict=True
            )
        ]
        return [
            (
                "" if number and self.turns[number - 1].role == "assistant" else bare[number],
                kept[number][1] + self.turns[number].text.strip() + kept[number + 1][0],
                bare[number + 1] if self.turns[number].role == "assistant" or number == len(placeholders) - 1 else "",
            )
            for number in range(len(placeholders))
        ]

    def question_to_answer(self) -> str:
        """Return the generation prompt: the text between a question and the answer that the model generates."""
        first = next((number for number, turn in enumerate(self.turns) if turn.role == "assistant"), 0)
        return _PLACEHOLDERS.split(self.run(self.placeholders[:first], prompt=True))[-1] if first else ""

    def end_of_answer(self) -> tuple[str, bool]:
        """Return a pattern for the text that ends an answer, and whether it contains a special token."""
        answers = [number for number, turn in enumerate(self.turns) if turn.role == "assistant"]
        if not answers:
            return "", True
        tail = self.parts(count=answers[-1] + 1)[-1][2]
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        specials = sorted(added | set(self.tokenizer.all_special_tokens), key=len, reverse=True)
        match = re.match(rf"\s*(?:{'|'.join(map(re.escape, specials))})", tail) if specials else None
        return re.escape(match.group() if match else tail), match is not None


def _blanks(text: str) -> tuple[str, str]:
    """Return the blanks before and after a text, which some templates strip."""
    core = text.strip()
    if not core:
        return "", text
    before, _, after = text.partition(core)
    return before, after


def _kept_blanks(gap: str, plain: str, after: str, before: str) -> tuple[str, str]:
    """Return the blanks that the template keeps after one content and before the next; `gap` is the text between."""
    for kept in ((after, before), (after, ""), ("", before)):
        if gap == kept[0] + plain + kept[1]:
            return kept
    return "", ""
