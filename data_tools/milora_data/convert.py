"""`python -m milora_data convert`: convert other formats to LLaVA JSON."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from itertools import count as count_from
from pathlib import Path
from typing import Any

from milora_data.check import find_missing
from milora_data.formats.jsonfile import read_rows, write_objects
from milora_data.formats.stored import is_stored, stored_items
from milora_data.formats.tables import COLUMNS, DEFAULT_PROMPT, EMPTY_CELL, Records, TableOptions, is_record, row_record
from milora_data.hold_out import PICTURE, RECORD, held_out, leaks
from milora_data.keys import FileKeys, file_key
from milora_data.pictures.load import ImageError, Picture, picture_suffix
from milora_data.records import SPEAKERS, as_llava, parse_record
from milora_data.records.record import Record
from milora_data.stream import load_records
from milora_vl.common.cli.console import amount, next_step
from milora_vl.common.cli.parser import Command, option, positive, shared
from milora_vl.common.errors import DataError, UserError


def columns(text: str) -> dict[str, tuple[str]]:
    """Parse names of columns: the `type` of --columns.

    >>> columns("image=Bild,answer=Antwort")
    {'image': ('Bild',), 'answer': ('Antwort',)}
    """
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    named = [what for what, _ in pairs]
    if wrong := [what for what, name in pairs if what not in COLUMNS or not name or named.count(what) > 1]:
        raise argparse.ArgumentTypeError(f"expected PART=COLUMN of {', '.join(COLUMNS)}, each once, got {wrong[0]!r}")
    return {what: (name,) for what, name in pairs}


def main(argv: Sequence[str] | None = None) -> int:
    chosen = COMMAND.parse(argv)
    if chosen.hold_out_by and not chosen.hold_out:
        hint = "add:  --hold_out N"
        raise UserError("needs --hold_out", code="flag-needs-another", where="--hold_out_by", hint=hint)
    folder = chosen.output_dir
    key_of = OwnPictures(chosen.image_folder, folder / "images")
    images, out = PictureFolder(folder / "images", key_of), folder / "data.json"
    held = folder / f"{folder.resolve().name}-eval.json"  # a benchmark is named after its file
    new = [out, held] if chosen.hold_out else [out]
    if there := [path for path in new if path.exists()]:
        raise output_exists(there[0])
    field = None if chosen.hold_out_by in (PICTURE, RECORD) else chosen.hold_out_by
    named = chosen.columns or {}
    unused = {name for (name,) in named.values()} | ({"--prompt"} if chosen.prompt else set())
    options = TableOptions(chosen.prompt, field, COLUMNS | named, unused, chosen.split)
    more: dict[str, Any] = {}
    try:
        is_named = chosen.hold_out or len(chosen.sources) > 1
        read = _read(chosen.sources, options, key_of if is_named else None)
        records = _require_records(images.filled(read), chosen, options)
        if chosen.hold_out:
            numbers, records = _hold_out(list(records), chosen, held, key_of)
            more = {"held_out": str(held), "held_out_records": len(numbers)}
        count = write_objects(out, records)
    except BaseException:  # also Ctrl-C: existing files would make the next attempt fail
        for path in new:
            path.unlink(missing_ok=True)
        images.remove()
        raise
    for line in options.left_out[:5]:
        sys.stderr.write(f"left out: {line}\n")
    if len(options.left_out) > 5:
        sys.stderr.write(f"left out: {len(options.left_out) - 5:,} more records\n")
    more |= {"left_out": len(options.left_out)} if options.left_out else {}
    as_json = json.dumps({"file": str(out), "records": count, **more})
    sys.stdout.write(as_json + "\n" if chosen.format == "json" else f"{out}: {amount(count, 'record')}\n")
    beside = [folder for source in chosen.sources for folder in (Path(source).parent, Path(source).parent / "images")]
    shown = sorted({file for record in load_records(out) for file in record.files}, key=str)
    missing: dict[Path, int] = {}  # pictures that a folder lacks, or has others for
    for folder in [chosen.image_folder] if chosen.image_folder else [*beside, images.path]:
        keys = FileKeys(folder)
        is_other = (keys(file) != key_of(file) or file in keys.missing for file in shown)
        missing[folder] = sum(is_other) if is_named else len(find_missing(shown, folder))
    known = min(missing, key=missing.__getitem__)
    if missing[known]:
        sys.stderr.write(f"note: {missing[known]:,} of {len(shown):,} pictures are not in {known}: copy them there\n")
    pictures = ["--image_folder", known] if shown else []
    next_step("milora_data", "check", out, *pictures, *(["--against", held] if chosen.hold_out else []))
    return 0


def _require_records(records: Records, chosen: argparse.Namespace, options: TableOptions) -> Records:
    first, left_out = next(records, None), options.left_out
    if first is None:
        if options.splits and not left_out:
            message = f"no row of {chosen.split}; found: {', '.join(sorted(options.splits))}"
            raise UserError(message, code="convert-no-records", where="--split", hint="nothing was written")
        left = f"; {amount(len(left_out), 'record')} left out, the first: {left_out[0]}" if left_out else ""
        hint = "nothing was written; name a file with records"
        where = ", ".join(chosen.sources)
        raise UserError(f"no record to convert{left}", code="convert-no-records", where=where, hint=hint)
    return chain([first], records)


def _hold_out(
    records: list[dict[str, Any]], chosen: argparse.Namespace, path: Path, key_of: OwnPictures
) -> tuple[frozenset[int], Iterator[dict[str, Any]]]:
    """Write about `--hold_out` random records to `path`; return their indices, and the other records."""
    by = chosen.hold_out_by or PICTURE
    numbers = held_out(records, chosen.hold_out, by, key_of)
    if missing := sorted(map(str, key_of.missing)):
        message = f"{amount(len(missing), 'file')} not found, so that no leak can be excluded: {missing[0]}"
        hint = "nothing was written; name their folder, or leave out their records:  milora_data check DATA --fix OUT"
        raise UserError(message, code="hold-out-unknown", where="--image_folder", hint=hint)
    write_objects(path, (value for number, value in enumerate(records) if number in numbers))
    asked = "" if len(numbers) == chosen.hold_out else f", for the {chosen.hold_out:,} of --hold_out"
    sys.stderr.write(f"{path}: {amount(len(numbers), 'record')}, held out by {by}{asked}\n")
    if by != PICTURE:
        train, test = ([parse_record(v) for n, v in enumerate(records) if (n in numbers) == held] for held in (0, 1))
        if shared := len(list(leaks(train, test, key_of, key_of))):
            sys.stderr.write(f"note: {shared:,} of them have a picture or a whole question of training records\n")
    return numbers, (value for number, value in enumerate(records) if number not in numbers)


def _read(sources: Sequence[str], options: TableOptions, pictures: OwnPictures | None) -> Records:
    """Yield the records. An id of an earlier file gets a number, as ids of joined files name other records.

    Raises `DataError` for a file in another format, and what `pictures` raises.
    """
    used, num_renamed = set[str](), 0
    for source in sources:
        names: dict[str, str] = {}  # equal ids of one file stay equal
        for value in _stored(source, options) if is_stored(source) else _objects(Path(source), options):
            if old := str(value.get("id", "")):
                new = names.setdefault(old, next(name for name in _names_like(old) if name not in used))
                num_renamed += new != old
                value["id"] = new
            if pictures:
                pictures.add(parse_record(value), source)
            yield value
        used.update(names.values())
    if num_renamed:
        sys.stderr.write(f"note: {amount(num_renamed, 'id')} of earlier files got a number\n")
    if options.unused:
        flag = "--prompt" if "--prompt" in options.unused else "--columns"
        message = f"without effect: {', '.join(sorted(options.unused))}"
        raise UserError(message, code="flag-no-effect", where=flag, hint="remove the flag, or name columns of the data")


def _names_like(name: str) -> Iterator[str]:
    return chain([name], (f"{name}-{number}" for number in count_from(2)))


def _objects(source: Path, options: TableOptions) -> Records:
    """Records or rows of a table; broken ones are left out. Raises the first error if all are broken."""
    errors: list[DataError] = []
    num_usable = num_pictured = num_blank = 0
    for number, (line, value) in enumerate(read_rows(source, on_error=errors.append), start=1):
        where = f"{source}:{line}"
        if isinstance(value, dict) and not options.wants(value):
            continue
        try:
            if isinstance(value, dict) and not is_record(value):
                converted = row_record(value, options, place=where, identifier=f"{number}")
                record = parse_record(converted, source=where)
            else:
                record = parse_record(value, source=where)
                assert isinstance(value, dict)  # else parse_record raises
                converted = as_llava(value, number)
        except DataError as error:
            errors.append(error)
            continue
        num_usable += 1
        num_pictured += bool(record.images)
        num_blank += not (record.images or is_record(value)) and any(name in value for name in options.columns["image"])
        if any(picture.content for picture in record.images):  # embedded
            others = {key: item for key, item in converted.items() if key != "images"}
            converted = {**others, "image": list(record.images) if len(record.images) > 1 else record.images[0]}
        yield converted
    if num_pictured and num_blank:
        sys.stderr.write(f"note: {source}: {amount(num_blank, 'row')} without a picture, kept as text alone\n")
    if errors and not num_usable:
        raise errors[0]
    for skipped in errors:
        options.leave_out(skipped)


def _stored(source: str, options: TableOptions) -> Records:
    """Records of shards, tables and the hub, with all of their other columns that JSON can hold."""
    dropped: set[str] = set()
    for number, item in enumerate(stored_items(source, options)):
        if isinstance(item, DataError):
            if not isinstance(item, ImageError) and item.first.code != EMPTY_CELL:
                raise item
            options.leave_out(item)
            continue
        extra = {key: value for key, value in item.extra.items() if _fits_json(value)}
        dropped |= {*(item.extra.keys() - extra.keys()), *item.unread}
        yield options.with_kept({**_as_llava(item, str(number)), **extra}, item.extra)
    if dropped:
        sys.stderr.write(
            f"left out: columns that JSON cannot hold, keys of turns that are not read: {', '.join(sorted(dropped))}\n"
        )


def _fits_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def output_exists(path: Path) -> UserError:
    hint = "nothing was written; name a new --output_dir"
    return UserError(f"{path} exists already", code="output-exists", hint=hint)


class OwnPictures:
    """Returns the key of each picture or video: of its file beside the source that names it, or in `folder`."""

    def __init__(self, folder: Path | None, written: Path) -> None:
        self._folder = folder
        self._images, self._written = written, FileKeys(written)
        self._keys: dict[Path, FileKeys] = {}  # by the folder of a source
        self._named: dict[str, tuple[str, FileKeys]] = {}  # by the name of a picture: a source, and its folder's keys

    @property
    def missing(self) -> list[Picture]:
        return [picture for keys in self._keys.values() for picture in keys.missing]

    def add(self, record: Record, source: str) -> None:
        """Note the pictures of a record. Raises `UserError` if an earlier source has another picture of a name."""
        folder = self._folder or Path(source).parent
        keys = self._keys.setdefault(folder, FileKeys(folder, folder / "images"))
        for picture in (picture for picture in record.files if picture.content is None):
            name = os.path.normpath(picture.name)
            if name not in self and (self._images / name).is_file():
                self._named[name] = f"a table, which wrote it to {self._images}", self._written
            other, earlier = self._named.setdefault(name, (source, keys))
            if earlier is keys:
                continue
            is_other = keys(picture) != earlier(picture)
            if picture in earlier.missing:
                self._named[name] = source, keys
            elif is_other and picture not in keys.missing:
                message = f"{picture.name} is one picture for {other}, and another for {source}"
                hint = "convert each into its own --output_dir, or rename the pictures of one; nothing was written"
                raise UserError(message, code="convert-picture-names", where=source, hint=hint)

    def __contains__(self, name: str) -> bool:
        return name in self._named

    def __call__(self, picture: Picture) -> str:
        _, keys = self._named.get(os.path.normpath(picture.name), ("", self._written))
        return keys(picture)


class PictureFolder:
    def __init__(self, path: Path, named: OwnPictures) -> None:
        self.path, self._named = path, named
        self.is_mine = False  # created by this conversion
        self._used: Counter[str] = Counter()
        self._names: dict[str | None, str] = {}  # by the key of the picture

    def filled(self, records: Records) -> Records:
        """Yield the records after writing their stored pictures; equal pictures are written once."""
        for value in records:
            for key in ("image", "images"):
                field = value.get(key)
                if isinstance(field, list):
                    value[key] = [self._written(name) for name in field]
                elif field:
                    value[key] = self._written(field)
            yield value

    def remove(self) -> None:
        if self.is_mine:
            shutil.rmtree(self.path, ignore_errors=True)

    def _written(self, picture: Any) -> Any:
        if not isinstance(picture, Picture) or picture.content is None:
            return str(picture)
        key = file_key(picture)
        if key not in self._names:
            self._names[key] = self._write(picture)
        return self._names[key]

    def _write(self, picture: Picture) -> str:
        assert picture.content is not None
        if not self.is_mine and self.path.exists():
            raise output_exists(self.path)
        original = Path(picture.name.replace("\0", ""))  # file systems allow no NUL and at most 255 bytes
        stem, suffix = original.stem[:60] or "picture", original.suffix[:12] or picture_suffix(picture.content)
        name = wanted = f"{stem}{suffix}"
        while name in self._used or name in self._named:
            self._used[wanted] += 1
            name = f"{stem}-{self._used[wanted]}{suffix}"
        self._used[name] = 1
        self.path.mkdir(parents=True, exist_ok=True)
        self.is_mine = True
        (self.path / name).write_bytes(picture.content)
        return name


def _as_llava(record: Record, identifier: str) -> dict[str, Any]:
    images = {"image": record.images[0] if len(record.images) == 1 else list(record.images)} if record.images else {}
    turns = [
        {
            "from": SPEAKERS[turn.role],
            "value": turn.text,
            **({} if turn.weight or turn.role == "user" else {"weight": 0}),
            **json.loads(turn.keys or "{}"),
        }
        for turn in record.turns
        if turn.role != "tools"
    ]
    shown = [video.as_json() for video in record.videos]
    if any(file.content is not None for video in record.videos for file in video.files):
        raise DataError("frames of videos inside a table are not written to files", code="record-videos")
    videos = {"videos": shown} if shown else {}
    tools = {"tools": json.loads(record.turns[0].text)} if record.turns and record.turns[0].role == "tools" else {}
    return {"id": record.id or identifier, **images, **videos, "conversations": turns, **tools}


COMMAND = Command(
    "milora_data convert",
    "Convert another format to LLaVA JSON.",
    """\
sources, joined into one file; pictures in base64 and in shards are written to images/:
  .json, .jsonl    records of LLaVA's format, {"messages": [...], "images": [...]} of OpenAI, TRL and others, or rows
  .csv, .tsv       rows with columns for picture, question and answer, picture and caption, or instruction, input and
                   output; --columns names others
  .parquet, .tar   rows or records; webdataset (a.jpg with a.txt or a.json), a folder of save_to_disk
  hub:             hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]

examples:
  python -m milora_data convert a.jsonl b.jsonl --output_dir data
  python -m milora_data convert my_pictures.tar --output_dir data --prompt "What is this?"
  python -m milora_data convert fotos.csv --columns image=Bild,question=Frage,answer=Antwort --split train \\
      --output_dir data
""",
    inputs=(
        option("sources", nargs="+", metavar="SOURCE", help="file, folder of save_to_disk, or hub:NAME"),
        shared("image_folder", about="folder of the pictures (default: beside each SOURCE)"),
    ),
    settings=(
        option("--prompt", help=f'question for pictures with captions (default: "{DEFAULT_PROMPT}")'),
        option(
            "--columns",
            type=columns,
            metavar="PART=COLUMN,...",
            help=f"names of columns: {', '.join(COLUMNS)} (default: common English names)",
        ),
        option("--split", metavar="NAME", help="only the rows with this value of the column split"),
        option(
            "--hold_out", type=positive, metavar="N", help="write about N random records to FOLDER/FOLDER-eval.json"
        ),
        option(
            "--hold_out_by",
            metavar="picture|record|FIELD",
            help="what is never divided: records that share a picture, or of records without one a first question "
            "(default), each record, or those with an equal value in this column or key",
        ),
    ),
    outputs=(
        shared("output_dir", required=True, about="folder for data.json, which must not exist"),
        shared("format"),
    ),
)
