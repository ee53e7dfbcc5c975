"""`python -m milora_data check`: find all errors of a data set in one pass; the same before a training.

Training calls `check_for_training` before it loads a model.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from milora_data.check.findings import Finding, Report, as_json, as_text, examine
from milora_data.check.pictures import MissingImages, cause, elsewhere, find_faults, find_missing, is_empty
from milora_data.check.repair import write_repaired
from milora_data.formats.jsonfile import TABLES, read_objects
from milora_data.formats.stored import stored_items
from milora_data.pictures.embedded import convert_words, described
from milora_data.pictures.files import ImageError, ImagePolicy, OutsidePicture, StoredPicture, place_of
from milora_data.pictures.videos import require_pyav
from milora_data.records.record import Record, content_digest, identifier_of, parse_record
from milora_data.stream.sources import is_json, load_records, mixed_records, read_sources
from milora_vl.common.cli import command_line as cli
from milora_vl.common.cli.command_line import next_step
from milora_vl.common.cli.flags import DATA, Command, count, option, shared
from milora_vl.common.cli.web import url_problem, web_address
from milora_vl.common.errors import DataError, Problem, UserError, no_records

OUTSIDE = " (outside the image folder)"
_STORED_AT_ONCE = 256  # pictures of shards and tables that are kept until they are decoded together
HELD_OUT = ("eval.json", "val.json", "test.json")  # as our commands call the records that are not for training
WEB = " (a web address: pictures are not fetched)"
_Records: TypeAlias = dict[str, list[tuple[str, str]]]  # picture or video -> place and id of each record with it
COMMAND = Command(
    "milora_data check",
    "Find errors in a data set of LLaVA's format.",
    """\
exit code: 0 no errors (warnings are allowed), 1 errors found, 2 the data cannot be read at all

examples:
  python -m milora_data check train.json --image_folder images
  python -m milora_data check train.json --image_folder images --fix clean.json
""",
    inputs=(
        DATA,
        shared("image_folder", about="folder of the pictures (default: beside DATA)"),
    ),
    settings=(
        option(
            "--pictures",
            choices=("decode", "exist"),
            default="decode",
            help="decode each picture, or only check that its file exists (default: %(default)s)",
        ),
    ),
    outputs=(
        option("--fix", type=Path, metavar="OUT", help="write the usable records, repaired, to this new file"),
        option("--limit", type=count, default=5, help="examples to print per kind (default: %(default)s)"),
        shared("format"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 if there are errors."""
    chosen = COMMAND.parse(argv)
    folder = image_folder(chosen.data, chosen.image_folder)
    if chosen.fix is not None and chosen.fix.exists():
        raise UserError(
            f"{chosen.fix} exists already",
            code="output-exists",
            hint="nothing was written; name a new file with --fix",
        )
    if chosen.fix is not None and not is_json(chosen.data):
        raise UserError(
            f"--fix repairs JSON and JSON lines, not {chosen.data}",
            code="check-fix-unsupported",
            hint="convert shards with milora_data convert --from hub; repair the sources of a mixture one by one",
        )
    report = scan(chosen.data, folder, pictures=chosen.pictures)
    if not report.records and not report.findings:
        raise UserError(problems=[no_records(chosen.data)])
    sys.stdout.write(as_json(report) if chosen.format == "json" else as_text(report, chosen.limit))
    if chosen.fix is not None:
        sys.stderr.write(write_repaired(report, chosen.data, chosen.fix))
    _print_next_step(report, chosen.fix, ["--image_folder", folder] if report.picture_files else [])
    return 1 if report.count("error") else 0


def _print_next_step(report: Report, fixed: Path | None, pictures: Sequence[str | Path]) -> None:
    kinds = report.by_kind()
    if "embedded_picture" in kinds:
        next_step("milora_data", *convert_words(report.path, "llava"))
    elif fixed is None and not report.count("error") and Path(report.path).name in HELD_OUT:
        data = ["--data", *pictures[1:]] if pictures else []
        next_step("milora_eval", "run", "--model", "MODEL", "--benchmarks", report.path, *data, "--output_dir", "OUT")
    elif fixed is not None or not report.count("error"):
        next_step("milora_vl.train", "--model", "MODEL", "--data_path", fixed or report.path, *pictures, "--dry-run")
    elif 0 < report.num_missing == report.picture_files:
        next_step("milora_data", "check", report.path, "--image_folder", "FOLDER")
    elif _num_usable(report):
        next_step("milora_data", "check", report.path, *pictures, "--fix", "OUT.json")
    elif kinds.keys() == {"not_a_record"}:
        next_step("milora_data", "convert", "--help")


def _num_usable(report: Report) -> int:
    """Return how many records have no error; broken JSON gives no record."""
    errors = (finding for finding in report.findings if finding.severity == "error" and finding.kind != "broken_json")
    return report.records - len({finding.where for finding in errors})


def image_folder(data: Path, option: Path | None) -> Path:
    """Return the folder that picture names are relative to.

    It is the value of the option, else the folder of the data file or its subfolder `images`, whichever contains the
    first picture. Raises `UserError` if the folder does not exist.
    """
    if option is not None:
        if not option.is_dir():
            raise UserError(problems=[no_folder(option)])
        return option
    try:
        first = next((record.files[0] for record in load_records(data) if record.files), "")
    except DataError:
        return data.parent  # the command itself reports the error
    places = (data.parent, data.parent / "images")
    return next((place for place in places if first and (place / first).is_file()), data.parent)


def no_folder(folder: Path) -> Problem:
    """Return the problem of an image folder that does not exist."""
    address = url_problem(folder)
    if address is not None:
        return replace(address, where="--image_folder")
    return cli.no_folder(folder, "--image_folder", "image folder")


def scan(path: Path, folder: Path, *, pictures: Literal["decode", "exist"] = "decode") -> Report:
    """Return a report on all records of `path` and their pictures below `folder`.

    Raises `DataError` only if there is no such file.
    """
    report = Report(str(path), str(folder))
    used: _Records = {}
    stored: _Records = {}
    videos: set[str] = set()
    contents: dict[str, dict[str, bytes]] = {}  # file -> id -> the digest of its first record
    for record in readable(path, report):
        report.records += 1
        report.with_pictures += bool(record.images)
        report.with_videos += bool(record.videos)
        report.findings += examine(record)
        videos.update(record.video_files)
        if is_json(path) and (first := next((name for name in record.files if isinstance(name, StoredPicture)), None)):
            size = f"{len(first.content):,} bytes"
            report.findings.append(Finding("embedded_picture", record.source, size, record.id))
        of_file = contents.setdefault(record.source.rpartition(":")[0], {})
        if record.id and of_file.setdefault(record.id, digest := content_digest(record)) != digest:
            report.findings.append(Finding("repeated_id", record.source, "an earlier record has this id", record.id))
        for name in record.files:
            of_kind = stored if isinstance(name, StoredPicture) else used
            of_kind.setdefault(name, []).append((record.source, record.id))
        if len(stored) >= _STORED_AT_ONCE:  # their contents are in memory
            _scan_pictures(stored, folder, pictures, videos, report)
            stored, videos = {}, {name for name in videos if not isinstance(name, StoredPicture)}
    for names in (stored, used):
        _scan_pictures(names, folder, pictures, videos, report)
    return report


def readable(source: str | Path, report: Report) -> Iterator[Record]:
    """Yield the records and add a finding to `report` for each other value. Raises `DataError` for a missing file."""
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
                report.findings.append(Finding("not_a_record", str(item.first.where), _without_place(item.first)))


def _without_place(problem: Problem) -> str:
    return "\n".join(filter(None, (problem.message, problem.hint)))


def _readable_json(path: Path, report: Report) -> Iterator[Record]:

    def broken(error: DataError) -> None:
        report.findings.append(Finding("broken_json", str(error.first.where), _without_place(error.first)))

    objects = read_objects(path, on_error=broken)
    while True:
        try:
            place, value = next(objects)
        except StopIteration:
            return
        except DataError as error:
            if not path.is_file() or path.suffix.lower() in TABLES:
                raise
            return broken(error)
        try:
            yield parse_record(value, source=f"{path}:{place}")
        except DataError as error:
            report.records += 1
            kind = "corrupt_picture" if isinstance(error, ImageError) else "not_a_record"
            name = identifier_of(value, ("id",), "") if isinstance(value, dict) else ""
            report.findings.append(Finding(kind, f"{path}:{place}", _without_place(error.first), name))


def _scan_pictures(used: _Records, folder: Path, how: str, videos: Collection[str], report: Report) -> None:
    def add(kind: str, name: str, message: str) -> None:
        report.findings += [Finding(kind, where, message, identifier) for where, identifier in used[name]]

    report.picture_files += len(used)
    missing, names = find_missing(used, folder), dict[Path, dict[str, str]]()
    for name in missing:
        if is_empty(place_of(folder, name)):
            kind = "corrupt_video" if name in videos else "corrupt_picture"
            add(kind, name, f"{name}: the file is empty")
            continue
        place = place_of(folder, name)
        shown, why = name, OUTSIDE if isinstance(place, OutsidePicture) else cause(place, names)
        if web_address(name) is not None:
            shown, why = described(name), WEB
        report.num_missing += 1
        add("missing_picture", name, shown + why)
    if how == "decode":
        gone = set(missing)
        for name, kind, message in find_faults([name for name in used if name not in gone], folder, videos):
            add(kind, name, f"{name}: {message}")


def check_for_training(
    data: str | Path | Iterable[Record], image_folder: str | Path | None = None, bad_images: ImagePolicy = "raise"
) -> dict[str, int]:
    """Check a data set for errors that would stop training, without decoding pictures; `data` is a file or its records.

    Returns counts: records, with_pictures, missing_pictures, unlearnable (skipped by the collator).
    Raises `DataError` with the count, the first cases and a hint if the file is not a data set, if turns are out of
    order, or if the number of `<image>` differs from the number of pictures. Raises `MissingImages` for missing or
    empty pictures, if `bad_images` is `raise`.
    """
    path = Path(data) if isinstance(data, str | Path) else None
    folder = Path(image_folder or "")
    if not folder.is_dir():
        raise DataError(problems=[no_folder(folder)])
    number = with_pictures = 0
    has_video_files = False
    errors: list[Finding] = []
    used: dict[str, str] = {}
    for record in load_records(data) if isinstance(data, str | Path) else data:  # once: there may be millions
        number += 1
        with_pictures += bool(record.images)
        errors += [finding for finding in examine(record) if finding.severity == "error"]
        for name in record.files:
            used.setdefault(name, record.source)
        has_video_files = has_video_files or bool(record.video_files)
    if has_video_files:
        require_pyav()
    if not number:
        raise DataError(problems=[no_records(path or "the data")])
    unlearnable = [finding for finding in errors if finding.kind == "no_answer"]
    if len(errors) > len(unlearnable):
        raise _broken([finding for finding in errors if finding.kind != "no_answer"])
    missing = find_missing(used, folder)
    if missing and bad_images == "raise":
        raise MissingImages(missing, used, folder, elsewhere(missing, folder, path.parent if path else None))
    return {
        "records": number,
        "with_pictures": with_pictures,
        "missing_pictures": len(missing),
        "unlearnable": len(unlearnable),
    }


def _broken(findings: Sequence[Finding]) -> DataError:
    """Return the error for broken records, with the first five of them."""
    lines = [f"{finding.place}: {finding.sentence}" for finding in findings[:5]]
    more = [f"... and {len(findings) - 5:,} more"] if len(findings) > 5 else []
    path = findings[0].where.rpartition(":")[0] or "DATA"
    return DataError(
        "\n".join([f"{len(findings):,} broken records", *lines, *more]),
        code="data-broken-records",
        hint=f"see: python -m milora_data check {path}; --fix OUT writes a file without them",
    )
