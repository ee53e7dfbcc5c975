"""Conversations as text, and which of it is supervised: by our prompt formats, or by a model's chat template.

A chat template is a Jinja program that returns one text and does not mark the answers. It runs with the texts of a
record, and once per form of conversation with placeholders as texts. The text between the placeholders is the
template's; the answers are between these stretches in the first text. A wrong loss mask is therefore an error and never
silent.

What the template writes around an answer is measured once, with one question and one answer: the text that asks for an
answer, and the special token that ends it.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

from milora_data.encode.templates import OWN, TEMPLATES, Segment, render, split_turns, template_name
from milora_data.encode.tokens import TokenizerTraits, eos_text, own_template, tokenizer_traits
from milora_data.records.boxes import require_no_boxes
from milora_data.records.record import IMAGE, Turn
from milora_vl.common.errors import MALFORMED, DataError, UserError

# Characters of Unicode's private use area: no template handles them specially.
_PLACEHOLDER = "\ue000{}\ue001"
_PLACEHOLDERS = re.compile("\ue000[0-9]+\ue001")
# The mark of a video in the texts of turns.
VIDEO_MARK = "\ue000video\ue001"
_MOST_FORMS = 1024  # of conversations, whose template text is kept
# A picture and the line break that belongs to its marker: the one after it ("<image>\ntext", as a part of a message is
# read too), else the one before it ("text\n<image>").
_MARKERS = re.compile(f"({IMAGE}|{VIDEO_MARK})\n|\n?({IMAGE}|{VIDEO_MARK})(?!\n)")

MessagePart = Mapping[str, str]


def segments_of(
    turns: Sequence[Turn],
    template: str,
    tokenizer: Any,
    *,
    prompt: bool = False,
    traits: TokenizerTraits | None = None,
) -> tuple[list[int], list[Segment]]:
    """Return the ids before the conversation (BOS, or none) and its segments, rendered for `tokenizer`.

    With `prompt`, they end where the next answer begins. Raises `DataError` for turns that the template refuses.
    """
    name = template_name(template)
    require_no_boxes(turn.text for turn in turns)
    bos = tokenizer_traits(tokenizer).bos if traits is None else traits.bos
    if name == OWN:
        segments = own_segments(turns, tokenizer, prompt=prompt)
        is_added = segments and bos and _processor_adds(str(tokenizer.bos_token), segments[0].text, tokenizer)
        return (bos if is_added else []), segments
    return bos, render(turns, TEMPLATES[name], eos_text(tokenizer), prompt=prompt)


def require_template(template: str, tokenizer: Any) -> None:
    """Raise `UserError` for an unknown template, and for the tokenizer's own template if it has none."""
    if template_name(template) == OWN:
        own_template(tokenizer)


def _processor_adds(bos: str, text: str, tokenizer: Any) -> bool:
    """Return whether transformers adds the BOS to a chat template's text: for a processor (it has `<image>`) only."""
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    return not text.startswith(bos) and image is not None and image != tokenizer.unk_token_id


def own_segments(turns: Sequence[Turn], tokenizer: Any, *, prompt: bool = False) -> list[Segment]:
    """Return the segments of a conversation in the tokenizer's own chat template.

    Supervised are the assistant's texts with the token that ends each of them, also of earlier turns of a `prompt`:
    their tokens have to equal those in the training.
    Raises `UserError` without a chat template, and `DataError` if it refuses the turns or rewrites their texts.
    """
    form = _chat_template(tokenizer, own_template(tokenizer))
    if prompt:
        rendered = form.render(turns, prompt=True)
        if any(turn.role == "assistant" for turn in turns):
            earlier = form.render(turns)
            if earlier.supervised and not rendered.text.startswith(earlier.text[: earlier.supervised[-1][1]]):
                raise DataError(
                    "the chat template writes an earlier answer of this record in another way before a request",
                    hint="use another --template, or split the record before the request",
                )
            rendered = rendered._replace(supervised=earlier.supervised)
    else:
        rendered = form.render(turns)
    segments, at = [], 0
    for start, end in [*rendered.supervised, (len(rendered.text), len(rendered.text))]:
        segments += [Segment(rendered.text[at:start], supervised=False), Segment(rendered.text[start:end], True)]
        at = end
    return [segment for segment in segments if segment.text]


@lru_cache(maxsize=4)
def _chat_template(tokenizer: Any, template: str) -> TextTemplate:
    return TextTemplate(template, tokenizer)  # it runs the template several times, to learn its form


class Rendered(NamedTuple):
    """A conversation as the processor reads it: each picture is the template's placeholder.

    `supervised` has the ranges of characters (start, end) on which the loss is computed. In a plain prompt,
    `suffix` is the whole answer, and all of it is supervised; other prompts have no suffix (None).
    """

    text: str
    supervised: tuple[tuple[int, int], ...]
    suffix: str | None = None


def parts_of(text: str) -> list[MessagePart]:
    """Return the text of a turn as the parts of a message: pictures, videos, and the stretches of text between them.

    >>> parts_of("<image>\\nWhat is it?")
    [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]
    >>> [part.get("text", "picture") for part in parts_of("Is this\\n<image>\\n like <image>?")]
    ['Is this\\n', 'picture', ' like ', 'picture', '?']
    """
    parts: list[MessagePart] = []
    end = 0
    for marker in _MARKERS.finditer(text):
        parts += _text_part(text[end : marker.start()])
        parts.append({"type": "image" if IMAGE in marker.group() else "video"})
        end = marker.end()
    parts += _text_part(text[end:])
    return parts or [{"type": "text", "text": ""}]


def _text_part(text: str) -> list[MessagePart]:
    return [{"type": "text", "text": text}] if text else []


def prompt_format(processor: Any) -> ImageTemplate | PlainPrompt:
    """Return how conversations are written for this processor: its chat template, or its documented plain prompt."""
    tokenizer = processor.tokenizer
    template = processor.chat_template or tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if template:
        return ImageTemplate(str(template), tokenizer)
    if "suffix" in inspect.signature(type(processor).__call__).parameters:
        return PlainPrompt()
    raise UserError(
        f"{type(processor).__name__} has no chat template",
        code="processor-no-chat-template",
        hint="put the chat_template.jinja of an instruction-tuned variant of this model into the model's folder,\n"
        "or set processor.chat_template",
    )


class PlainPrompt:
    """The prompt of processors that take question and answer apart, as text and `suffix` (PaliGemma)."""

    takes_conversations = False
    end: str | None = None

    def render(self, turns: Sequence[Turn], *, prompt: bool = False) -> Rendered:
        """Return the question with its pictures in front, and the answer. Raises `DataError` for other conversations.

        >>> PlainPrompt().render([Turn("user", "<image>\\ncaption en"), Turn("assistant", "A cat.")])
        Rendered(text='<image>caption en', supervised=(), suffix='A cat.')
        """
        roles = [turn.role for turn in turns]
        if roles != (["user"] if prompt else ["user", "assistant"]):
            raise DataError(
                f"this model takes one question and one answer, found turns of {', '.join(roles) or 'nobody'}",
                code="record-not-one-question",
                hint="its processor has no chat template; set one for conversations",
            )
        parts = parts_of(turns[0].text)
        if all(part["type"] != "image" for part in parts):
            raise DataError(
                "this model takes no text without a picture",
                code="record-not-one-question",
                hint="its processor has no chat template; set one for conversations",
            )
        question = "".join(part.get("text", "") for part in parts)
        text = IMAGE * sum(part["type"] == "image" for part in parts) + question
        return Rendered(text, (), turns[1].text if not prompt and turns[1].weight else None)


@dataclass(frozen=True, slots=True)
class _Frame:
    """What the template writes around an answer.

    `request` is the text that asks for an answer, `lead` what it writes between that and an answer, `end` a pattern for
    the text that ends an answer, `closes` whether that is a special token.
    """

    request: str
    lead: str
    end: str
    closes: bool


class _Dialogue(NamedTuple):
    """What a chat template gets: messages, and the definitions of tools."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None

    def up_to(self, number: int) -> _Dialogue:
        return self._replace(messages=self.messages[:number])

    def form(self) -> str:
        """Return all that decides the template's own text, if it does not read the texts of messages."""
        return json.dumps(
            [[{**message, "content": _kinds(message["content"])} for message in self.messages], self.tools]
        )

    def marked(self, numbers: Sequence[int]) -> _Dialogue:
        """Return the dialogue with placeholders as the pieces of the messages `numbers`."""
        marks, shown = map(_PLACEHOLDER.format, count()), list(self.messages)
        for number in sorted(numbers):
            message = shown[number] = dict(shown[number])
            content = message["content"]
            if not isinstance(content, str):
                message["content"] = [{**part, "text": next(marks)} if "text" in part else part for part in content]
            elif content or "tool_calls" not in message:
                message["content"] = next(marks)
            if "tool_calls" in message:
                message["tool_calls"] = [
                    {**call, "function": {**call["function"], "name": next(marks)}} for call in message["tool_calls"]
                ]
        return self._replace(messages=shown)


def _pieces(message: Mapping[str, Any]) -> list[str]:
    """Return what a message has to be written with: its texts, and the names of the functions that it calls."""
    content, calls = message["content"], message.get("tool_calls", ())
    texts = [content] * bool(content or not calls) if isinstance(content, str) else _texts(content)
    return [*texts, *(call["function"]["name"] for call in calls)]


class ImageTemplate:
    """A chat template for conversations whose turns contain pictures. Raises `UserError` if it omits answers."""

    takes_conversations = True
    forms_of_content = (True, False)  # in parts, or as texts: the form that is tried first

    def __init__(self, template: str, tokenizer: Any) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.special_tokens = tokenizer.special_tokens_map
        self.in_parts = True  # texts are lists of parts; some templates want a plain text where there is no picture
        self.frame, self.end = self._measured()
        self._gaps_of_form: dict[object, list[str]] = {}

    def render(self, turns: Sequence[Turn], *, prompt: bool = False) -> Rendered:
        """Return the text of a conversation and its supervised ranges; with `prompt`, up to where an answer begins.

        Supervised is what the model has to write: the text after the request for an answer, up to and including the
        special token that ends the answer. If the template has no such token, an EOS is added to the last answer.
        The tool calls of an answer are a part of it. Raises `DataError` if the template refuses the turns, rewrites an
        answer, or omits tools, calls or results.
        """
        system, exchange = split_turns(turns)
        kept = ([] if system is None else [Turn("system", system)]) + list(exchange)
        dialogue = self._dialogue(kept, next((json.loads(turn.text) for turn in turns if turn.role == "tools"), None))
        text = self._run(dialogue, prompt)
        if dialogue.tools or any(turn.keys or turn.role == "tool" for turn in kept):
            self._require_tools(dialogue, text, prompt)
        if prompt or all(turn.role != "assistant" for turn in kept):
            return Rendered(text, ())
        masked, spans, gaps = self._located(text, dialogue)
        ranges, first = [], 0
        for number in masked:
            last = first + len(_pieces(dialogue.messages[number])) - 1
            if kept[number].role == "assistant" and kept[number].weight:
                around = gaps[first], gaps[last + 1]
                if kept[number].keys:
                    before, after = self._around_calls(dialogue, number, masked, *around)
                else:
                    ends = re.match(self.frame.end, around[1])
                    before, after = self._written_by_model(around[0]), ends.end() if ends else 0
                ranges.append((spans[first][0] - before, spans[last][1] + after))
            first = last + 1
        if not self.frame.closes and kept[-1].role == "assistant":
            text += eos_text(self.tokenizer)
            if kept[-1].weight:
                ranges[-1] = (ranges[-1][0], len(text))
        return Rendered(text, tuple(ranges))

    def _require_tools(self, dialogue: _Dialogue, text: str, prompt: bool) -> None:
        """Raise `DataError` if the template omits the tools, a call or a result."""
        messages = dialogue.messages
        used = [number for number, one in enumerate(messages) if one["role"] == "tool" or "tool_calls" in one]
        marks = sum(len(_pieces(messages[number])) for number in used)
        marked = _PLACEHOLDERS.findall(self._run(dialogue.marked(used), prompt))
        lacks = "calls of tools or their results" if len(set(marked)) < marks else ""
        if dialogue.tools and text == self._run(dialogue._replace(tools=None), prompt):
            lacks = "tools"
        if lacks:
            hint = "use a model whose template writes tools, or remove them from the record"
            raise DataError(f"the model's chat template omits the {lacks}", code="record-tools", hint=hint)

    def _around_calls(
        self, dialogue: _Dialogue, number: int, masked: Sequence[int], before: str, after: str
    ) -> tuple[int, int]:
        """Return how many characters the model writes before and after the pieces of an answer with calls.

        `before` and `after` are the template's text around them. The model writes what the request for this answer
        lacks, up to the token that ends the answer where it is the last one.
        Raises `DataError` if the template writes the answer in another way where turns follow.
        """
        earlier = [other for other in masked if other < number]
        own = self._gaps(dialogue.up_to(number + 1), [*earlier, number])[-1]
        *_, end = (0, *(match.end() for match in re.finditer(self.frame.end, own)))
        written, is_known = self._written_by_model(before), bool(end) and after.startswith(own[:end])
        if not dialogue.messages[number]["content"]:
            lead = self._gaps(dialogue.up_to(number), earlier, prompt=True)[-1]
            if not before.startswith(lead):  # a request to think, which the template drops from earlier answers
                texts = list(dialogue.messages)
                texts[number] = {"role": "assistant", "content": "a"}
                lead = self._gaps(dialogue._replace(messages=texts), [*earlier, number])[-2]
            written, is_known = len(before) - len(lead), is_known and before.startswith(lead)
        if not is_known:
            raise DataError(
                "the chat template writes a tool call before later turns in another form than at the end",
                code="record-tools",
                hint="end the record with the call, or use a model with another template",
            )
        return written, end

    def _located(self, text: str, dialogue: _Dialogue) -> tuple[Sequence[int], list[tuple[int, int]], Sequence[str]]:
        """Return the numbers of some turns, with all answers; the spans of their texts in `text`, and what is around.

        What the template writes around all texts is kept for conversations of the same form. Where it depends on a
        text, the template runs again for this conversation, with placeholders as answers alone.
        """
        form = dialogue.form()
        everything = range(len(dialogue.messages))
        if form not in self._gaps_of_form:
            if len(self._gaps_of_form) >= _MOST_FORMS:
                self._gaps_of_form.clear()
            try:
                self._gaps_of_form[form] = self._gaps(dialogue, everything)
            except DataError:  # the template reads the texts
                self._gaps_of_form[form] = []
        gaps = self._gaps_of_form[form]
        spans = _spans(text, [piece for message in dialogue.messages for piece in _pieces(message)], gaps)
        if spans is not None:
            return everything, spans, gaps
        answers = [number for number, message in enumerate(dialogue.messages) if message["role"] == "assistant"]
        gaps = self._gaps(dialogue, answers)
        pieces = [piece for number in answers for piece in _pieces(dialogue.messages[number])]
        spans = _spans(text, pieces, gaps)
        if spans is None:
            changes = "rewrites" if len(gaps) == len(pieces) + 1 else "omits or repeats"
            raise DataError(
                f"the model's chat template {changes} an answer of this record, so the supervised part is unknown",
                hint="change the record, or train a model with another template",
            )
        return answers, spans, gaps

    def _gaps(self, dialogue: _Dialogue, masked: Sequence[int], *, prompt: bool = False) -> list[str]:
        """Return what the template writes before, between and after the texts of the turns `masked`."""
        return _PLACEHOLDERS.split(self._run(dialogue.marked(masked), prompt))

    def _written_by_model(self, gap: str) -> int:
        """Return how many characters at the end of a gap the model has to write before an answer."""
        request, lead = self.frame.request, self.frame.lead
        if not request:
            return len(lead) if gap.endswith(lead) else 0
        written = gap[gap.rfind(request) + len(request) :] if request in gap else ""
        return len(written) if written == lead else 0

    def _dialogue(self, turns: Sequence[Turn], tools: list[Any] | None = None) -> _Dialogue:
        return _Dialogue(
            [{"role": turn.role, "content": self._content(turn), **json.loads(turn.keys or "{}")} for turn in turns],
            tools,
        )

    def _content(self, turn: Turn) -> Any:
        parts = parts_of(turn.text)
        if turn.role == "assistant" and turn.keys and not turn.text:
            return ""  # a call without a text
        if self.in_parts or any(part["type"] != "text" for part in parts):
            # The text of an answer gives its position, so an answer of pictures alone gets an empty text.
            needs_text = turn.role == "assistant" and not any("text" in part for part in parts)
            return [*parts, {"type": "text", "text": ""}] if needs_text else parts
        return turn.text

    def _run(self, dialogue: _Dialogue, prompt: bool = False) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            # What apply_chat_template calls after its checks of the caller's values, which take as long.
            texts, _ = render_jinja_template(  # type: ignore[str-unpack]  # annotated as a text
                [dialogue.messages],
                tools=dialogue.tools,
                chat_template=self.template,
                add_generation_prompt=prompt,
                **self.special_tokens,
            )
            return str(texts[0])
        except (TemplateError, *MALFORMED) as error:
            raise DataError(
                f"the model's chat template refuses this conversation: {error}",
                code="chat-template-refuses",
                hint="change the record as the template's message says",
            ) from None

    def _measured(self) -> tuple[_Frame, str | None]:
        """Return what the template writes around an answer, and its end token; find its form of content."""
        question, answer = (_PLACEHOLDER.format(number) for number in range(2))
        turns = [Turn("user", question), Turn("assistant", answer)]
        attempts: list[list[str]] = []
        for in_parts in self.forms_of_content:
            self.in_parts = in_parts
            try:
                text = self._run(self._dialogue(turns))
            except DataError as error:
                refusal = error
                continue
            attempts.append(_PLACEHOLDERS.findall(text))
            if attempts[-1] == [question, answer]:
                break
        else:
            if not attempts:
                raise refusal
            written = "the question alone" if [question] in attempts else "something else"
            raise UserError(
                f"the chat template of this model does not write question and answer once each, but {written}",
                code="chat-template-no-answers",
                hint="use the chat template of an instruction-tuned model",
            )
        _, between, tail = _PLACEHOLDERS.split(text)
        asked = _PLACEHOLDERS.split(self._run(self._dialogue(turns[:1]), prompt=True))[-1]
        closed = _PLACEHOLDERS.split(self._run(self._dialogue(turns[:1])))[-1]
        request = asked.removeprefix(closed) if asked.startswith(closed) else asked
        lead = between.removeprefix(asked) if between.startswith(asked) else ""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        specials = sorted(added | set(self.tokenizer.all_special_tokens), key=len, reverse=True)
        match = re.match(rf"\s*(?:{'|'.join(map(re.escape, specials))})", tail) if specials else None
        end = match.group() if match else tail
        return _Frame(request, lead, re.escape(end), match is not None), end.strip() if match else None


class TextTemplate(ImageTemplate):
    """A tokenizer's chat template: `<image>` in a turn is a text like any other."""

    forms_of_content = (False, True)

    def _content(self, turn: Turn) -> Any:
        return [{"type": "text", "text": turn.text}] if self.in_parts else turn.text


def _texts(content: Sequence[Mapping[str, str]]) -> list[str]:
    return [part["text"] for part in content if "text" in part]


def _kinds(content: str | Sequence[Mapping[str, str]]) -> list[str] | None:
    return None if isinstance(content, str) else [part["type"] for part in content]


def _spans(text: str, pieces: Sequence[str], gaps: Sequence[str]) -> list[tuple[int, int]] | None:
    """Return where the pieces are in a text that is made of gaps and, between them, the pieces or their stripped form.

    None if the text is something else.

    >>> _spans("USER: a ASSISTANT: b</s>", [" b\\n"], ["USER: a ASSISTANT: ", "</s>"])
    [(19, 20)]
    """
    if len(gaps) != len(pieces) + 1 or not text.startswith(gaps[0]):
        return None
    spans, at = [], len(gaps[0])
    for piece, gap in zip(pieces, gaps[1:], strict=True):
        forms = dict.fromkeys((piece, piece.rstrip(), piece.lstrip(), piece.strip()))
        fitting = next((form for form in forms if text.startswith(form + gap, at)), None)
        if fitting is None:
            return None
        spans.append((at, at + len(fitting)))
        at += len(fitting) + len(gap)
    return spans if at == len(text) else None
