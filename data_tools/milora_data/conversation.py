"""A conversation as segments, by one of our templates or by the chat template that the tokenizer brings.

A chat template is a program that gives one text. To know what of it is learnt, it is run on place-holders that it
cannot trip over; the true texts are put in their places, and the result must be what it makes of the true texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from milora_data.errors import DataError
from milora_data.records import Turn
from milora_data.templates import OWN, TEMPLATES, Segment, render, split_turns, template_name
from milora_data.tokens import Habits, eos_text, habits, own_template

_HOLE = "\ue000{}\ue001"  # private use: no template knows them
_HOLES = re.compile("\ue000([0-9]+)\ue001")


def segments_of(
    turns: Sequence[Turn], template: str, tokenizer: Any, *, prompt: bool = False, knows: Habits | None = None
) -> tuple[list[int], list[Segment]]:
    """Return the ids in front of the conversation (BOS, or none) and its segments, made for `tokenizer`.

    With `prompt`, they end where the next answer begins. Raises `DataError` for turns that the template does not take.
    """
    name = template_name(template)
    if name == OWN:
        return [], own_segments(turns, tokenizer, prompt=prompt)
    bos = habits(tokenizer).bos if knows is None else knows.bos
    text = str(tokenizer.bos_token) if bos else ""
    return bos, render(turns, TEMPLATES[name], eos_text(tokenizer), bos=text, prompt=prompt)


def own_segments(turns: Sequence[Turn], tokenizer: Any, *, prompt: bool = False) -> list[Segment]:
    """Return the segments of a conversation in the tokenizer's own chat template.

    Learnt are the answers and what ends them: the special token that the template puts behind them. Where it puts none,
    nobody could tell when to stop: there, what it does put is learnt, and an EOS at the end of the conversation.
    Raises `UserError` without a chat template, `DataError` where it refuses the turns or rewrites their texts.
    """
    own_template(tokenizer)
    system, exchange = split_turns(turns)
    used = ([] if system is None else [Turn("system", system)]) + list(exchange)
    template = _ChatTemplate(tokenizer, used)
    end, has_token = template.end_of_answer()
    segments: list[Segment] = []
    for turn, (before, content, after) in zip(used, template.parts(prompt), strict=True):
        learnt = turn.role == "assistant"
        tail = re.match(end, after)
        cut = tail.end() if learnt and tail else 0
        segments += [Segment(before, learnt=False), Segment(content + after[:cut], learnt), Segment(after[cut:], False)]
    if "".join(segment.text for segment in segments) != template.run([turn.text for turn in used], prompt):
        raise DataError("the tokenizer's chat template rewrites a text of this record; what is learnt cannot be told")
    if not has_token and not prompt and used and used[-1].role == "assistant":
        segments.append(Segment(eos_text(tokenizer), learnt=True))
    return [segment for segment in segments if segment.text]


class _ChatTemplate:
    """The tokenizer's template, run on some turns with other texts in them."""

    def __init__(self, tokenizer: Any, turns: Sequence[Turn]) -> None:
        self.tokenizer, self.turns = tokenizer, list(turns)
        self.in_parts = False  # messages in parts, as the templates of vision models take them
        self.blanks = [_blanks(turn.text) for turn in turns]
        self.holes = [_HOLE.format(number) for number in range(len(turns))]
        try:
            self.in_parts = len(_HOLES.findall(self.run(self.holes))) < len(turns)
        except DataError as refused:
            self.in_parts = True
            try:
                self.run(self.holes)
            except DataError:
                raise refused from None

    def run(self, texts: Sequence[str], prompt: bool = False) -> str:
        """Return what the template makes of the first turns, with `texts` as their contents."""
        from jinja2 import TemplateError

        messages = [
            {"role": turn.role, "content": [{"type": "text", "text": text}] if self.in_parts else text}
            for turn, text in zip(self.turns, texts, strict=False)
        ]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
        except (TemplateError, TypeError) as error:
            raise DataError(f"the tokenizer's chat template refuses this conversation: {error}") from None

    def parts(self, prompt: bool = False, count: int | None = None) -> list[tuple[str, str, str]]:
        """Return for each turn the text in front of its content, the content, and (of the last or an answer) behind."""
        holes, blanks = self.holes[:count], self.blanks[:count]
        bare = _HOLES.split(self.run(holes, prompt))[::2]
        blank = [first + hole + last for hole, (first, last) in zip(holes, blanks, strict=True)]
        gaps = _HOLES.split(self.run(blank, prompt))[::2]
        if not len(bare) == len(gaps) == len(holes) + 1:
            raise DataError("the tokenizer's chat template leaves a text of this record out, or says it twice")
        kept = [
            _kept(gap, plain, behind, first)
            for gap, plain, behind, first in zip(
                gaps, bare, ["", *(last for _, last in blanks)], [*(first for first, _ in blanks), ""], strict=True
            )
        ]
        return [
            (
                "" if number and self.turns[number - 1].role == "assistant" else bare[number],
                kept[number][1] + self.turns[number].text.strip() + kept[number + 1][0],
                bare[number + 1] if self.turns[number].role == "assistant" or number == len(holes) - 1 else "",
            )
            for number in range(len(holes))
        ]

    def end_of_answer(self) -> tuple[str, bool]:
        """Return a pattern for what ends an answer in this template, and whether there is a special token in it."""
        answers = [number for number, turn in enumerate(self.turns) if turn.role == "assistant"]
        if not answers:
            return "", True
        tail = self.parts(count=answers[-1] + 1)[-1][2]
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        specials = sorted(added | set(self.tokenizer.all_special_tokens), key=len, reverse=True)
        found = re.match(rf"\s*(?:{'|'.join(map(re.escape, specials))})", tail) if specials else None
        return re.escape(found.group() if found else tail), found is not None


def _blanks(text: str) -> tuple[str, str]:
    """Return the blanks in front of and behind a text, which some templates cut off."""
    core = text.strip()
    if not core:
        return "", text
    before, _, after = text.partition(core)
    return before, after


def _kept(gap: str, plain: str, behind: str, before: str) -> tuple[str, str]:
    """Return which of the blanks around a gap between two contents the template has kept."""
    for kept in ((behind, before), (behind, ""), ("", before)):
        if gap == kept[0] + plain + kept[1]:
            return kept
    return "", ""
