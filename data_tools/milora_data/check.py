"""`python -m milora_data check`: everything that is wrong with a data set, in one pass, with file and line.

Training calls `check_for_training` before it loads a model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from milora_data.captions import SUFFIXES
from milora_data.command import count, next_step, parser
from milora_data.errors import DataError, UserError
from milora_data.findings import Finding, examine
from milora_data.flags import RECORDS, shared
from milora_data.images import ImagePolicy, OutsidePicture, place_of
from milora_data.jsonfile import read_objects
from milora_data.mix import mixed_records, read_sources
from milora_data.pictures import MissingImages, elsewhere, find_faults, find_missing, uses
from milora_data.records import Record, is_json, load_records, parse_record
from milora_data.repair import write_repaired
from milora_data.report import Report, as_json, as_text
from milora_data.stored import stored_items

EPILOG = """\
exit code: 0 no errors (warnings may be meant), 1 errors found, 2 the data cannot be read at all

examples:
  python -m milora_data check train.json --image_folder images
  python -m milora_data check train.json --image_folder images --fix clean.json
"""
OUTSIDE = " (outside the image folder)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 if there are errors."""
    options = parser("python -m milora_data check", "Find what is broken in a data set of LLaVA's format.", EPILOG)
    given = options.add_argument_group("input")
    given.add_argument("data", type=Path, metavar="DATA", help=RECORDS)
    shared(given, "image_folder", about="folder of the pictures (default: beside DATA)")
    settings = options.add_argument_group("settings")
    settings.add_argument(
        "--pictures",
        choices=("decode", "exist"),
        default="decode",
        help="read each one, or only look for its file (default: %(default)s)",
    )
    out = options.add_argument_group("output")
    out.add_argument("--fix", type=Path, metavar="OUT", help="write what is usable, repaired, to this new file")
    out.add_argument("--limit", type=count, default=5, help="examples to print of each kind (default: %(default)s)")
    shared(out, "format")
    chosen = options.parse_args(argv)
    if chosen.data.is_file() and chosen.data.suffix.lower() in SUFFIXES:
        raise UserError(f"{chosen.data}: this is a picture; expected a JSON or JSONL file that names it")
    folder = image_folder(chosen.data, chosen.image_folder)
    if chosen.fix is not None and chosen.fix.exists():
        raise UserError(f"{chosen.fix} exists already\nnothing was written; name a new file with --fix")
    if chosen.fix is not None and not is_json(chosen.data):
        raise UserError(f"--fix repairs JSON and JSON lines, not {chosen.data}\nconvert it first: milora_data convert")
    report = scan(chosen.data, folder, pictures=chosen.pictures)
    if not report.records and not report.findings:
        raise UserError(f"{chosen.data}: no records")
    sys.stdout.write(as_json(report) if chosen.format == "json" else as_text(report, chosen.limit))
    if chosen.fix is not None:
        sys.stderr.write(write_repaired(report, chosen.data, chosen.fix))
    _tell_next(report, chosen.fix, ["--image_folder", folder] if report.with_pictures else [])
    return 1 if report.count("error") else 0


def _tell_next(report: Report, fixed: Path | None, pictures: Sequence[str | Path]) -> None:
    found = report.by_kind()
    if found.keys() == {"not_a_record"} and len(report.findings) == report.records:
        next_step("milora_data", "convert", "--help")
    elif fixed is None and _is_wrong_folder(report):
        next_step("milora_data", "check", report.path, "--image_folder", "FOLDER")
    elif report.count("error") and not _num_usable(report):
        next_step("milora_data", "check", "--help")
    elif report.count("error") and fixed is None:
        next_step("milora_data", "check", report.path, *pictures, "--fix", "OUT.json")
    else:
        next_step("milora_vl.train", "--model", "MODEL", "--data_path", fixed or report.path, *pictures, "--dry-run")


def _is_wrong_folder(report: Report) -> bool:
    """Whether no picture at all was found, of those that are not named in a way that no folder mends."""
    missing = {finding.message for finding in report.by_kind().get("missing_picture", ())}
    outside = sum(name.endswith(OUTSIDE) for name in missing)
    return outside < len(missing) == report.picture_files


def _num_usable(report: Report) -> int:
    return report.records - len({finding.where for finding in report.findings if finding.severity == "error"})


def image_folder(data: Path, given: Path | None) -> Path:
    """Return the folder that picture names are relative to.

    That is the given one, else the folder of the data file or `images` in it, whichever holds the first picture.
    Raises `UserError` for a folder that is not there.
    """
    if given is not None:
        if not given.is_dir():
            raise UserError(f"no such folder: {given}\nname the folder of the pictures with --image_folder")
        return given
    try:
        first = next((record.images[0] for record in load_records(data) if record.images), "")
    except DataError:
        return data.parent  # the command itself says what is broken
    places = (data.parent, data.parent / "images")
    return next((place for place in places if first and (place / first).is_file()), data.parent)


def scan(path: Path, folder: Path, *, pictures: Literal["decode", "exist"] = "decode") -> Report:
    """Examine every record of `path` and every picture below `folder`.

    Raises `DataError` only if there is nothing to read.
    """
    report = Report(str(path), str(folder))
    ids: dict[str, str] = {}
    contents: dict[int, str] = {}
    used: dict[str, list[str]] = {}
    for record in readable(path, report):
        report.records += 1
        report.with_pictures += bool(record.images)
        report.findings += examine(record)
        repeated = bool(record.id) and record.id in ids
        if repeated:
            report.findings.append(Finding("duplicate_id", record.source, f"{record.id} (first at {ids[record.id]})"))
        ids.setdefault(record.id, record.source)
        content = hash((record.images, record.turns))
        if content in contents and not repeated:
            report.findings.append(Finding("duplicate_record", record.source, f"first at {contents[content]}"))
        contents.setdefault(content, record.source)
        for name in record.images:
            used.setdefault(name, []).append(record.source)
    _scan_pictures(used, folder, pictures, report)
    return report


def readable(source: str | Path, report: Report) -> Iterator[Record]:
    """Yield the records; what is none becomes a finding of `report`. Raises `DataError` if there is no such file."""
    if str(source).endswith((".yaml", ".yml")):
        yield from mixed_records(*read_sources(Path(source)), read=partial(readable, report=report))
    elif is_json(source):
        yield from _readable_json(Path(source), report)
    else:
        for item in stored_items(str(source)):
            if isinstance(item, Record):
                yield item
            else:
                report.records += 1
                where, _, message = str(item).partition(": ")
                report.findings.append(Finding("not_a_record", where, message))


def _readable_json(path: Path, report: Report) -> Iterator[Record]:

    def broken(error: DataError) -> None:
        where, known, message = str(error).partition(": broken JSON: ")
        if not known:
            where, _, message = str(error).rpartition(": ")
        report.findings.append(Finding("broken_json", where, message))

    objects = read_objects(path, on_error=broken)
    while True:
        try:
            place, value = next(objects)
        except StopIteration:
            return
        except DataError as error:
            if not path.is_file():
                raise
            return broken(error)
        try:
            yield parse_record(value, source=f"{path}:{place}")
        except DataError as error:
            report.records += 1
            where = f"{path}:{place}"
            report.findings.append(Finding("not_a_record", where, str(error).removeprefix(f"{where}: ")))


def _scan_pictures(used: Mapping[str, list[str]], folder: Path, how: str, report: Report) -> None:
    report.picture_files = len(used)
    missing = find_missing(used, folder)
    for name in missing:
        outside = OUTSIDE if isinstance(place_of(folder, name), OutsidePicture) else ""
        report.findings += [Finding("missing_picture", where, f"{name}{outside}") for where in used[name]]
    if how == "decode":
        gone = set(missing)
        for name, kind, message in find_faults([name for name in used if name not in gone], folder):
            report.findings += [Finding(kind, where, f"{name}: {message}") for where in used[name]]


def check_for_training(
    data: str | Path | Iterable[Record], image_folder: str | Path | None = None, bad_images: ImagePolicy = "raise"
) -> dict[str, int]:
    """Check what training would stumble over, without decoding pictures; `data` is a file or its records.

    Returns counts: records, with_pictures, missing_pictures, unlearnable (left out by the collator).
    Raises `DataError` with count, first cases and what to do: a file that is no data set, turns out of order, `<image>`
    and pictures that do not match, and, unless `bad_images` says otherwise, missing pictures (`MissingImages`).
    """
    path = Path(data) if isinstance(data, str | Path) else None
    folder = Path(image_folder or "")
    if not folder.is_dir():
        raise DataError(f"no such image folder: {folder}\nname it with --image_folder")
    records = list(load_records(data) if isinstance(data, str | Path) else data)
    if not records:
        raise DataError(f"{path or 'the data'}: no records")
    found = [finding for record in records for finding in examine(record) if finding.severity == "error"]
    unlearnable = [finding for finding in found if finding.kind == "no_answer"]
    if len(found) > len(unlearnable):
        raise DataError(_broken([finding for finding in found if finding.kind != "no_answer"]))
    used = uses(records)
    missing = find_missing(used, folder)
    if missing and bad_images == "raise":
        raise MissingImages(missing, len(used), folder, elsewhere(missing, folder, path.parent if path else None))
    return {
        "records": len(records),
        "with_pictures": sum(bool(record.images) for record in records),
        "missing_pictures": len(missing),
        "unlearnable": len(unlearnable),
    }


def _broken(findings: Sequence[Finding]) -> str:
    lines = [f"{finding.where}: {finding.sentence}" for finding in findings[:5]]
    more = [f"... and {len(findings) - 5:,} more"] if len(findings) > 5 else []
    path = findings[0].where.rpartition(":")[0] or "DATA"
    hint = f"see: python -m milora_data check {path}; --fix OUT writes a file without them"
    return "\n".join([f"{len(findings):,} broken records", *lines, *more, hint])
