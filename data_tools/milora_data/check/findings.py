"""The kinds of errors and warnings that a record can have (`KINDS`), and the rules that detect them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from milora_data.encode.templates import place_images, split_tool_turns, split_turns
from milora_data.records.record import IMAGE, Record, estimated_length, tools_of, uses_tools
from milora_vl.base.errors import DataError
from milora_vl.cli.command_line import amount

Severity = Literal["error", "warning"]


class Kind(NamedTuple):
    """One kind of finding. A record with an error cannot be used for training; a warning may be intended."""

    severity: Severity
    title: str


KINDS: Mapping[str, Kind] = {
    "broken_json": Kind("error", "broken JSON"),
    "not_a_record": Kind("error", "not a record of LLaVA's format"),
    "turn_order": Kind("error", "questions and answers do not alternate"),
    "no_answer": Kind("error", "no supervised tokens: no answer to a question"),
    "placeholders": Kind("error", f"the number of {IMAGE} differs from the number of pictures"),
    "missing_picture": Kind("error", "missing picture"),
    "corrupt_picture": Kind("error", "picture that cannot be read"),
    "broken_text": Kind("error", "text that is not valid Unicode (half of a surrogate pair)"),
    "embedded_picture": Kind("warning", "picture embedded as base64, which a training keeps in memory"),
    "empty_answer": Kind("warning", "empty answer: the model learns to answer nothing"),
    "empty_question": Kind("warning", "empty question"),
    "duplicate_id": Kind("warning", "id used before"),
    "answer_first": Kind("warning", "starts with an answer, which is dropped"),
    "unanswered": Kind("warning", "ends with a question, which has no effect on training"),
    "special_token": Kind("warning", "text contains a special token, which is encoded as such"),
    "several_placeholders": Kind("warning", f"more {IMAGE} in a turn than the record has pictures: one is kept"),
    "picture_in_answer": Kind("warning", f"answer contains {IMAGE}"),
    "role_in_text": Kind("warning", "text contains a role marker such as USER:, as if an answer had not stopped"),
    "damaged_text": Kind("warning", "text with characters that an encoding conversion has destroyed"),
    "control_character": Kind("warning", "text with control characters"),
    "long_record": Kind("warning", "longer than 2,048 tokens, by estimate: max_length will cut it"),
    "duplicate_record": Kind("warning", "same pictures and same conversation as an earlier record"),
    "outside_folder": Kind("warning", "picture with an absolute path, or a path outside the folder"),
    "animated_picture": Kind("warning", "animated picture: its first frame is used"),
    "rotated_picture": Kind("warning", "picture with an EXIF rotation: it is turned upright (LLaVA does not)"),
    "transparent_picture": Kind("warning", "picture with transparency, which is dropped as in LLaVA"),
    "long_picture": Kind("warning", "picture more than 10 times as long as wide: mostly padding"),
}
# Special tokens of Llama, Vicuna, Qwen, SmolLM and GPT-2; a tokenizer has only some of them.
SPECIAL_TOKENS = ("<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>")

_LONGEST = 300
# Kinds whose messages are complete without the title.
_SENTENCES = ("broken_json", "not_a_record", "turn_order", "placeholders")
_ESTIMATED_TOKENS = 2048
_ROLE = re.compile(r"(?:^|\n| )(?:ASSISTANT|USER|### ?(?:Human|Assistant)): ")
_LOST = re.compile("\ufffd|\u00c3[\u0080-\u00bf]|\u00e2\u20ac")  # typical of UTF-8 text decoded as Latin-1
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PATTERNS = {
    "broken_text": _SURROGATE,
    "role_in_text": _ROLE,
    "damaged_text": _LOST,
    "control_character": CONTROL,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One error or warning: a key of `KINDS`, the place ("file:line"), and the details."""

    kind: str
    where: str
    message: str

    def __post_init__(self) -> None:
        # Findings are printed: remove half surrogate pairs, which a terminal cannot print, and shorten long texts.
        text = self.message.encode("utf-8", "replace").decode()
        object.__setattr__(self, "message", text if len(text) <= _LONGEST else text[:_LONGEST] + " ...")

    @property
    def sentence(self) -> str:
        """Return the message with the title of its kind, if the message is incomplete without it."""
        return self.message if self.kind in _SENTENCES else f"{KINDS[self.kind].title}: {self.message}"

    @property
    def severity(self) -> Severity:
        """Return `error` or `warning`."""
        return KINDS[self.kind].severity


def examine(record: Record) -> Iterator[Finding]:
    """Yield the errors and warnings of the record itself; its pictures are not checked."""

    def finding(kind: str, message: str) -> Finding:
        return Finding(kind, record.source, message)

    try:
        has_tools = uses_tools(record)
        exchange = (split_tool_turns if has_tools else split_turns)(record.turns)[1]
        tools_of(record)
    except DataError as error:
        yield finding("turn_order", error.first.message)
        return
    try:
        place_images(record.turns, len(record.images))
    except DataError as error:
        yield finding("placeholders", error.first.message)
    else:
        if sum(turn.text.count(IMAGE) for turn in record.turns) > len(record.images):
            number = next(n for n, turn in enumerate(record.turns, start=1) if turn.text.count(IMAGE) > 1)
            yield finding("several_placeholders", f"turn {number}")
    if len(exchange) < 2:
        yield finding("no_answer", amount(len(record.turns), "turn"))
    elif exchange[-1].role != "assistant":
        yield finding("unanswered", exchange[-1].text)
    if len(exchange) < sum(turn.role != "system" for turn in record.turns):
        yield finding("answer_first", next(turn.text for turn in record.turns if turn.role == "assistant"))
    tokens = estimated_length(record, 576)
    if tokens > _ESTIMATED_TOKENS:
        yield finding("long_record", f"about {tokens:,} tokens")
    outside = [name for name in record.images if name.startswith(("/", "~", "\\")) or ".." in name.split("/")]
    if outside:
        yield finding("outside_folder", outside[0])
    yield from _texts(record)


def _texts(record: Record) -> Iterator[Finding]:
    for number, turn in enumerate(record.turns, start=1):
        where = f"turn {number}"
        if turn.is_blank:
            if turn.role == "assistant":
                yield Finding("empty_answer", record.source, where)
            elif turn.role == "user" and IMAGE not in turn.text:
                yield Finding("empty_question", record.source, where)
        if turn.role == "assistant" and IMAGE in turn.text:
            yield Finding("picture_in_answer", record.source, where)
        for kind, pattern in _PATTERNS.items():
            if (match := pattern.search(turn.text)) is not None:
                excerpt = turn.text[max(0, match.start() - 20) : match.end() + 20]
                yield Finding(kind, record.source, f"{where}: {excerpt!r}" if kind != "broken_text" else where)
        specials = [token for token in SPECIAL_TOKENS if token in turn.text]
        if specials:
            yield Finding("special_token", record.source, f"{where}: {', '.join(specials)}")
