"""`python -m milora_data check`: find all errors of a data set in one pass.

`--fix` writes its usable records; `--against` finds what a test set shares with the data.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

from milora_data.check import KINDS, Finding, Report, errors_of, image_folder, scan
from milora_data.formats.jsonfile import read_objects, write_objects
from milora_data.formats.stored import is_stored
from milora_data.hold_out import leaks
from milora_data.keys import FileKeys
from milora_data.records import as_llava, parse_record
from milora_data.records.record import IMAGE
from milora_data.stream import load_records
from milora_vl.common.cli.console import amount, next_step
from milora_vl.common.cli.parser import DATA, Command, count, option, shared
from milora_vl.common.errors import DataError, UserError, no_records

# Findings of a record that --fix leaves out: no repair fixes it without guessing, or it is there already.
_LEFT_OUT = (
    "not_a_record", "turn_order", "missing_picture", "corrupt_picture", "corrupt_video", "broken_text", "duplicate"
)  # fmt: skip
BROKEN_LIST = "broken JSON list: the records after the error could not be read"
COMMAND = Command(
    "milora_data check",
    "Find errors in a data set of LLaVA's format.",
    """\
exit code: 0 no errors (warnings are allowed), 1 errors found, 2 the data cannot be read at all
the rules hold for every model; a training with --dry-run adds the rules of its --model

examples:
  python -m milora_data check train.json --image_folder images
  python -m milora_data check train.json --image_folder images --fix clean.json
  python -m milora_data check train.json --against test.json
""",
    inputs=(
        DATA,
        shared("image_folder", about="folder of the pictures (default: beside DATA)"),
        option("--against", type=Path, metavar="TEST", help="find what this test set shares with DATA"),
    ),
    outputs=(
        option(
            "--fix",
            type=Path,
            metavar="OUT",
            help="write the usable records to this new file, each once, with a missing <image> inserted",
        ),
        option("--limit", type=count, default=5, help="examples to print per kind (default: %(default)s)"),
        shared("format"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    chosen = COMMAND.parse(argv)
    folder = image_folder(chosen.data, chosen.image_folder)
    if chosen.fix is not None and chosen.fix.exists():
        hint = "nothing was written; name a new file with --fix"
        raise UserError(f"{chosen.fix} exists already", code="output-exists", hint=hint)
    if chosen.fix is not None and is_stored(chosen.data):
        message = f"--fix repairs JSON and JSON lines, not {chosen.data}"
        hint = "convert it with milora_data convert"
        raise UserError(message, code="check-fix-unsupported", hint=hint)
    report = scan(chosen.data, folder)
    if not report.records and not report.findings:
        raise UserError(problems=[no_records(chosen.data)])
    if chosen.against is not None:
        _add_leaks(report, chosen.data, folder, chosen.against)
    sys.stdout.write(as_json(report) if chosen.format == "json" else as_text(report, chosen.limit))
    if chosen.fix is not None:
        done = write_repaired(report, chosen.data, chosen.fix)
        if done[BROKEN_LIST]:
            return 1  # most records may be behind the error: no next step
    _print_next_step(report, chosen.fix, ["--image_folder", folder] if report.picture_files else [])
    return 1 if report.count("error") else 0


def _add_leaks(report: Report, data: Path, folder: Path, test: Path) -> None:
    """Add the records of a test set that leak; its pictures are beside the test or in the folder of the data."""
    of_train, of_test = FileKeys(folder), FileKeys(test.parent, test.parent / "images", folder)
    for record, place in leaks(load_records(data), load_records(test), of_train, of_test):
        report.findings.append(Finding("leaked", record.source, f"also in {place}", record.id))
    unknown = [f"{name}: no such file, so its content is unknown" for name in sorted(map(str, of_test.missing))]
    report.findings += [Finding("leaked", str(test), message) for message in unknown]


def _print_next_step(report: Report, fixed: Path | None, pictures: Sequence[str | Path]) -> None:
    if "embedded_picture" in report.by_kind():
        next_step("milora_data", "convert", report.path, "--output_dir", "OUT")
    elif fixed is not None or not report.count("error"):
        next_step("milora_vl.train", "--model", "MODEL", "--data_path", fixed or report.path, *pictures, "--dry-run")
    elif 0 < report.num_missing == report.picture_files:
        next_step("milora_data", "check", report.path, "--image_folder", "FOLDER")
    else:
        next_step("milora_data", "check", report.path, *pictures, "--fix", "OUT.json")


def as_json(report: Report) -> str:
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
    return "\n".join([*lines, "", counts if report.findings else "no errors or warnings", ""])


def write_repaired(report: Report, data: Path, out: Path) -> Counter[str]:
    """Write the usable records; print and return the numbers of changes. Raises `UserError` without any."""
    done: Counter[str] = Counter()
    lost = {finding.where: finding.kind for finding in report.findings if finding.kind in _LEFT_OUT}
    usable = _usable(data, lost, done)
    first = list(islice(usable, 1))
    written = write_objects(out, chain(first, usable)) if first else 0
    if kept := report.by_kind().get("contradiction"):
        done[f"to decide by hand: {KINDS['contradiction'].title}"] = len(kept)
    changes = "".join(f"\n  {number:,} {what}" for what, number in done.most_common())
    if not written:
        message = f"no record of {data} is usable; nothing was written{changes}"
        hint = "edit the records, or copy or download the file again"
        raise UserError(message, where=str(data), hint=hint)
    sys.stderr.write(f"{out}: {amount(written, 'record')}{changes}\n")
    return done


def _usable(data: Path, lost: dict[str, str], done: Counter[str]) -> Iterator[dict[str, Any]]:
    def broken(_: DataError) -> None:
        done[f"left out: {KINDS['broken_json'].title}"] += 1

    try:
        for number, (line, value) in enumerate(read_objects(data, on_error=broken), start=1):
            kind = lost.get(f"{data}:{line}")
            if kind is None:
                assert isinstance(value, dict)
                repaired = _with_pictures_shown(as_llava(value, number), done)
                record = parse_record(repaired)
                kind = next((finding.kind for finding in errors_of(record)), None)
            if kind is not None:
                done[f"left out: {KINDS[kind].title}"] += 1
            elif all(turn.is_blank for turn in record.turns if turn.role == "assistant"):
                done["left out: every answer is empty"] += 1
            else:
                yield repaired
    except DataError:
        done[BROKEN_LIST] += 1


def _with_pictures_shown(value: dict[str, Any], done: Counter[str]) -> dict[str, Any]:
    """Return a LLaVA dict whose first question shows the pictures, if no turn has an `<image>`."""
    record = parse_record(value)
    first = next((index for index, turn in enumerate(record.turns) if turn.role == "user"), None)
    if first is None or not record.images or any(IMAGE in turn.text for turn in record.turns):
        return value
    turns = list(value["conversations"])
    turns[first] = {**turns[first], "value": f"{IMAGE}\n" * len(record.images) + turns[first]["value"]}
    done[f"missing {IMAGE} inserted at the start"] += 1
    return {**value, "conversations": turns}
