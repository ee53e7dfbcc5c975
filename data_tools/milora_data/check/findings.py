"""The kinds of errors and warnings of records (`KINDS`), the rules that detect them, and the report of a scan."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from milora_data.encode.templates import place_images, split_tool_turns, split_turns
from milora_data.records.record import IMAGE, Record, tools_of, uses_tools
from milora_vl.common.cli.command_line import amount
from milora_vl.common.errors import DataError

Severity = Literal["error", "warning"]


class FindingKind(NamedTuple):
    """One kind of finding. A record with an error cannot be used for training; a warning may be intended."""

    severity: Severity
    title: str


KINDS: Mapping[str, FindingKind] = {
    "broken_json": FindingKind("error", "broken JSON"),
    "not_a_record": FindingKind("error", "not a record of LLaVA's format"),
    "turn_order": FindingKind("error", "questions and answers do not alternate"),
    "no_answer": FindingKind("error", "no supervised tokens: no answer to a question"),
    "placeholders": FindingKind("error", f"the number of {IMAGE} differs from the number of pictures"),
    "missing_picture": FindingKind("error", "missing picture or video"),
    "corrupt_picture": FindingKind("error", "picture that cannot be read"),
    "corrupt_video": FindingKind("error", "video that cannot be read"),
    "broken_text": FindingKind("error", "text that is not valid Unicode (half of a surrogate pair)"),
    "embedded_picture": FindingKind("warning", "picture embedded as base64, which a training keeps in memory"),
    "tiny_picture": FindingKind("warning", "picture of less than 8 pixels on a side"),
    "repeated_id": FindingKind("warning", "different records with one id"),
    "empty_answer": FindingKind("warning", "empty answer: the model learns to answer nothing"),
    "empty_question": FindingKind("warning", "empty question"),
    "answer_first": FindingKind("warning", "starts with an answer, which is dropped"),
    "unanswered": FindingKind("warning", "ends with a question, which has no effect on training"),
    "special_token": FindingKind("warning", "text contains a special token, which is encoded as such"),
    "several_placeholders": FindingKind("warning", f"more {IMAGE} in a turn than the record has pictures: one is kept"),
    "control_character": FindingKind("warning", "text with control characters"),
}
# Special tokens of Llama, Vicuna, Qwen, SmolLM and GPT-2; a tokenizer has only some of them.
SPECIAL_TOKENS = ("<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>")

_LONGEST = 300
# Kinds whose messages are complete without the title.
_SENTENCES = ("broken_json", "not_a_record", "turn_order", "placeholders")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PATTERNS = {"broken_text": _SURROGATE, "control_character": CONTROL}


@dataclass(frozen=True, slots=True)
class Finding:
    """One error or warning: a key of `KINDS`, the place ("file:line"), the details, and the id of the record."""

    kind: str
    where: str
    message: str
    id: str = ""  # of the record

    def __post_init__(self) -> None:
        # Findings are printed: remove half surrogate pairs, which a terminal cannot print, and shorten long texts.
        text = self.message.encode("utf-8", "replace").decode()
        object.__setattr__(self, "message", text if len(text) <= _LONGEST else text[:_LONGEST] + " ...")

    @property
    def place(self) -> str:
        """Return the place with the id of the record, if it has one."""
        return f"{self.where} (id {self.id})" if self.id else self.where

    @property
    def sentence(self) -> str:
        """Return the message with the title of its kind, if the message is incomplete without it."""
        return self.message if self.kind in _SENTENCES else f"{KINDS[self.kind].title}: {self.message}"

    @property
    def severity(self) -> Severity:
        """Return `error` or `warning`."""
        return KINDS[self.kind].severity


@dataclass(slots=True)
class Report:
    """Counts and findings of a scan."""

    path: str
    image_folder: str
    records: int = 0
    with_pictures: int = 0
    with_videos: int = 0
    picture_files: int = 0  # and video files
    findings: list[Finding] = field(default_factory=list)
    num_missing: int = 0  # picture names without a file

    def count(self, severity: str) -> int:
        """Return the number of findings with a severity, `error` or `warning`."""
        return sum(finding.severity == severity for finding in self.findings)

    def by_kind(self) -> dict[str, list[Finding]]:
        """Return the findings of each kind that occurs, errors first."""
        return {
            kind: findings
            for kind in KINDS
            if (findings := [finding for finding in self.findings if finding.kind == kind])
        }


def as_json(report: Report) -> str:
    """Return the report as one JSON object."""
    content: dict[str, Any] = {
        "path": report.path,
        "image_folder": report.image_folder,
        "records": report.records,
        "with_pictures": report.with_pictures,
        "with_videos": report.with_videos,
        "picture_files": report.picture_files,
        "errors": report.count("error"),
        "warnings": report.count("warning"),
        "kinds": Counter(finding.kind for finding in report.findings),
        "findings": [{"severity": finding.severity, **asdict(finding)} for finding in report.findings],
    }
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def as_text(report: Report, limit: int) -> str:
    """Return the report as text: counts, then each kind of finding with its first cases."""
    files = amount(report.picture_files, "file")
    kinds = (("pictures", report.with_pictures), ("videos", report.with_videos))
    counts = ", ".join(f"{number:,} with {what}" for what, number in kinds if number)
    about = f"{counts} ({files}, looked for in {report.image_folder})" if counts else "text only"
    lines = [f"{report.path}: {amount(report.records, 'record')}, {about}"]
    for kind, findings in report.by_kind().items():
        severity, title = KINDS[kind]
        lines += ["", f"{severity:<8} {len(findings):>7,}  {title}"]
        lines += [f"    {finding.place}: {finding.message}".replace("\n", "\n    ") for finding in findings[:limit]]
        if len(findings) > limit:
            lines.append(f"    ... and {len(findings) - limit:,} more (--limit {len(findings)} shows all)")
    counts = ", ".join(amount(report.count(severity), severity) for severity in ("error", "warning"))
    return "\n".join([*lines, "", counts if lines[1:] else "no errors or warnings", ""])


def examine(record: Record) -> Iterator[Finding]:
    """Yield the errors and warnings of the record itself; its pictures are not checked."""

    def finding(kind: str, message: str) -> Finding:
        return Finding(kind, record.source, message, record.id)

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
    for kind, message in _texts(record):
        yield finding(kind, message)


def _texts(record: Record) -> Iterator[tuple[str, str]]:
    """Yield (kind, message) of each finding about the texts of a record."""
    for number, turn in enumerate(record.turns, start=1):
        where = f"turn {number}"
        if turn.is_blank:
            if turn.role == "assistant":
                yield "empty_answer", where
            elif turn.role == "user" and IMAGE not in turn.text:
                yield "empty_question", where
        for kind, pattern in _PATTERNS.items():
            if (match := pattern.search(turn.text)) is not None:
                excerpt = turn.text[max(0, match.start() - 20) : match.end() + 20]
                yield kind, f"{where}: {excerpt!r}" if kind != "broken_text" else where
        specials = [token for token in SPECIAL_TOKENS if token in turn.text]
        if specials:
            yield "special_token", f"{where}: {', '.join(specials)}"
