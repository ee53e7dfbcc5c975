"""`check --fix`: write the usable records of a data set to a new file, with repairs that are unambiguous."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from milora_data.check.findings import CONTROL, KINDS, Report, examine
from milora_data.formats.jsonfile import read_objects, write_objects
from milora_data.records.record import IMAGE, ROLES, as_llava, parse_record
from milora_vl.common.cli.command_line import amount
from milora_vl.common.errors import DataError, UserError

# Errors of a record that no repair fixes without guessing.
_FATAL = ("not_a_record", "turn_order", "missing_picture", "corrupt_picture", "corrupt_video", "broken_text")


def write_repaired(report: Report, data: Path, out: Path) -> str:
    """Write the usable records of `data`, repaired, to `out`; return a text that lists the changes.

    Raises `UserError`, and writes nothing, if no record is usable.
    """
    done: Counter[str] = Counter()
    lost = {finding.where: finding.kind for finding in report.findings if finding.kind in _FATAL}
    usable = _usable(data, lost, done)
    first = list(islice(usable, 1))
    if not first:
        message = "\n".join([f"no record of {data} is usable; nothing was written", *_changes(done)])
        hint = "edit the records, or copy or download the file again"
        raise UserError(message, code="data-no-usable-record", where=str(data), hint=hint)
    count = write_objects(out, chain(first, usable))
    return "\n".join([f"{out}: {amount(count, 'record')}", *_changes(done)]) + "\n"


def _changes(done: Counter[str]) -> list[str]:
    return [f"  {number:,} {what}" for what, number in done.most_common()]


def repair(value: dict[str, Any], done: Counter[str]) -> dict[str, Any]:
    """Return a LLaVA dict without turns that have no effect on training, and with missing `<image>` inserted."""
    turns = [dict(turn) for turn in value["conversations"]]
    start = 1 if turns and ROLES[turns[0]["from"]] == "system" else 0
    if turns[start:] and ROLES[turns[start]["from"]] == "assistant" and IMAGE not in turns[start]["value"]:
        del turns[start]
        done["answers before the first question removed"] += 1
    if turns and ROLES[turns[-1]["from"]] == "user" and IMAGE not in turns[-1]["value"]:
        del turns[-1]
        done["questions without answer removed"] += 1
    turns = _without_empty_answers(turns, done)
    for turn in turns:
        clean = CONTROL.sub("", turn["value"])
        if clean != turn["value"]:
            turn["value"] = clean
            done["texts without their control characters"] += 1
    pictures = parse_record(value).images
    if pictures and turns[start:] and not any(IMAGE in turn["value"] for turn in turns):
        turns[start]["value"] = f"{IMAGE}\n" * len(pictures) + turns[start]["value"]
        done[f"missing {IMAGE} inserted at the start"] += 1
    return {**value, "conversations": turns}


def _without_empty_answers(turns: list[dict[str, Any]], done: Counter[str]) -> list[dict[str, Any]]:
    """Return the turns without the questions that have an empty answer; unchanged if all answers are empty."""
    kept: list[dict[str, Any]] = []
    record = parse_record({"conversations": turns})
    if all(turn.is_blank for turn in record.turns if turn.role == "assistant"):
        return turns
    for turn, parsed in zip(turns, record.turns, strict=True):
        if parsed.role == "assistant" and parsed.is_blank and kept and ROLES[kept[-1]["from"]] == "user":
            del kept[-1]
            done["questions with an empty answer removed"] += 1
        else:
            kept.append(turn)
    return kept


def _usable(data: Path, lost: dict[str, str], done: Counter[str]) -> Iterator[dict[str, Any]]:
    def broken(_: DataError) -> None:
        done[f"left out: {KINDS['broken_json'].title}"] += 1

    try:
        for number, (place, value) in enumerate(read_objects(data, on_error=broken), start=1):
            kind = lost.get(f"{data}:{place}")
            if kind is None:
                assert isinstance(value, dict)
                repaired = repair(as_llava(value, number), done)
                record = parse_record(repaired)
                kind = next((f.kind for f in examine(record) if f.severity == "error"), None)
            if kind is not None:
                done[f"left out: {KINDS[kind].title}"] += 1
            elif all(turn.is_blank for turn in record.turns if turn.role == "assistant"):
                done["left out: every answer is empty"] += 1
            else:
                yield repaired
    except DataError:
        done["broken JSON list: the records after the error could not be read"] += 1
