"""`python -m milora_data convert`: convert other formats to LLaVA JSON."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from milora_data.convert.hold_out import PICTURE, RECORD, held_out, shared_pictures
from milora_data.formats.captions import caption_records
from milora_data.formats.jsonfile import read_objects, write_objects
from milora_data.formats.other_files import DEFAULT_PROMPT, EMPTY_CELL, coco_captions, instructions, refcoco, table
from milora_data.formats.stored import stored_items
from milora_data.formats.vqa_files import (
    Converter,
    Options,
    Records,
    aokvqa,
    gqa,
    ocrvqa,
    scienceqa,
    textvqa,
    vizwiz,
    vqa,
)
from milora_data.pictures.embedded import stored_pictures
from milora_data.pictures.files import ImageError, StoredPicture, picture_suffix
from milora_data.records.record import SPEAKERS, Record, as_llava, parse_record, tools_of
from milora_data.stream.sources import load_records
from milora_vl.common.cli.command_line import amount, next_step
from milora_vl.common.cli.flags import Command, option, positive, shared
from milora_vl.common.errors import MALFORMED, DataError, UserError, first_line


@dataclass(frozen=True, slots=True)
class SourceFormat:
    """One format: its converter and the flags that apply to it."""

    convert: Converter
    flags: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    chosen = COMMAND.parse(argv)
    _check_flags(chosen)
    images, out = PictureFolder(chosen.output_dir / "images"), chosen.output_dir / "data.json"
    held = chosen.output_dir / "eval.json"
    new = [out, held] if chosen.hold_out else [out]
    if there := [path for path in [*new, *([images.path] * (chosen.kind == "hub"))] if path.exists()]:
        raise output_exists(there[0])
    field = None if chosen.hold_out_by in (PICTURE, RECORD) else chosen.hold_out_by
    conversion = Options(chosen.prompt, chosen.split or "train", chosen.image_pattern, field)
    sources = chosen.sources if chosen.kind == "hub" else [Path(source) for source in chosen.sources]
    more: dict[str, Any] = {}
    try:
        records = _require_records(images.filled(_read(chosen.kind, sources, conversion)), chosen, conversion.left_out)
        if chosen.hold_out:
            numbers, records = _hold_out(list(records), chosen, held)
            more = {"held_out": str(held), "held_out_records": len(numbers)}
        count = write_objects(out, records)
    except BaseException:  # also Ctrl-C: existing files would make the next attempt fail
        for path in new:
            path.unlink(missing_ok=True)
        images.remove()
        raise
    _log_left_out(conversion.left_out)
    more |= {"left_out": len(conversion.left_out)} if conversion.left_out else {}
    as_json = json.dumps({"file": str(out), "records": count, **more})
    sys.stdout.write(as_json + "\n" if chosen.format == "json" else f"{out}: {amount(count, 'record')}\n")
    folder = sources[0] if chosen.kind == "folder" else images.path if images.is_mine else "FOLDER"
    has_pictures = any(record.images for record in load_records(out))
    next_step("milora_data", "check", out, *(["--image_folder", folder] if has_pictures else []))
    return 0


def _log_left_out(lines: Sequence[str]) -> None:
    """Print the first skipped records and the number of the others."""
    for line in lines[:5]:
        sys.stderr.write(f"left out: {line}\n")
    if len(lines) > 5:
        sys.stderr.write(f"left out: {len(lines) - 5:,} more records\n")


def _require_records(records: Records, chosen: argparse.Namespace, left_out: Sequence[str]) -> Records:
    """Return the records; raises `UserError` for an empty source."""
    first = next(records, None)
    if first is None:
        split = f" of split {chosen.split or 'train'} (--split)" if "split" in KINDS[chosen.kind].flags else ""
        left = f"; {amount(len(left_out), 'record')} left out, the first: {left_out[0]}" if left_out else ""
        raise UserError(
            f"no record{split} to convert{left}",
            code="convert-no-records",
            where=", ".join(chosen.sources),
            hint="nothing was written; name a file with records" + (", or another --split" if split else ""),
        )
    return chain([first], records)


def _hold_out(
    records: list[dict[str, Any]], chosen: argparse.Namespace, path: Path
) -> tuple[frozenset[int], Iterator[dict[str, Any]]]:
    """Write about `--hold_out` random records to `path`; return their indices, and the other records."""
    by = chosen.hold_out_by or PICTURE
    numbers = held_out(records, chosen.hold_out, by)
    write_objects(path, (value for number, value in enumerate(records) if number in numbers))
    asked = "" if len(numbers) == chosen.hold_out else f", for the {chosen.hold_out:,} of --hold_out"
    sys.stderr.write(f"{path}: {amount(len(numbers), 'record')}, held out by {by}{asked}\n")
    if shared := 0 if by == PICTURE else shared_pictures(records, numbers):
        sys.stderr.write(f"note: {shared:,} of them show a picture that training records show too\n")
    return numbers, (value for number, value in enumerate(records) if number not in numbers)


def _check_flags(chosen: argparse.Namespace) -> None:
    if chosen.hold_out_by and not chosen.hold_out:
        hint = "add:  --hold_out N"
        raise UserError("needs --hold_out", code="flag-needs-another", where="--hold_out_by", hint=hint)
    for flag in ("prompt", "split", "image_pattern"):
        if vars(chosen)[flag] is not None and flag not in KINDS[chosen.kind].flags:
            kinds = ", ".join(name for name, kind in KINDS.items() if flag in kind.flags)
            raise UserError(
                f"only applies to --from {kinds}, not to {chosen.kind}",
                code="flag-no-effect",
                where=f"--{flag}",
                hint="remove the flag",
            )
    if chosen.kind == "folder" and len(chosen.sources) > 1:
        raise UserError(
            "--from folder takes one folder, to which the names of the pictures are relative",
            code="convert-several-folders",
            where="--from",
            hint="convert one folder at a time",
        )


def _read(kind: str, sources: Sequence[Any], options: Options) -> Records:
    """Yield the records; raises `DataError` for a file in another format."""
    try:
        yield from KINDS[kind].convert(sources, options)
    except UserError:
        raise
    except MALFORMED as error:
        names = ", ".join(map(str, sources))
        reason = "its lists and objects have another structure"
        if isinstance(error, (KeyError, ValueError)):
            reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise DataError(
            f"not the format that --from {kind} expects: {reason}",
            code="convert-wrong-format",
            where=names,
            hint=f"name another format: --from {', '.join(KINDS)}",
        ) from None


def _llava(sources: Sequence[Path], options: Options) -> Records:
    """Records in LLaVA's form or in the form of `messages`, as every reader of records takes them.

    Bad records are left out; if all are bad, the file has another format and the first error is raised.
    """
    errors: list[DataError] = []
    num_usable = 0
    for source in sources:
        for number, (place, value) in enumerate(read_objects(source, on_error=errors.append), start=1):
            try:
                parse_record(value, source=f"{source}:{place}", embedded="keep")
            except DataError as error:
                errors.append(error)
                continue
            assert isinstance(value, dict)  # else parse_record raises
            num_usable += 1
            yield from stored_pictures(as_llava(value, number), f"{source}:{place}", options.left_out)
    if errors and not num_usable:
        raise errors[0]
    for skipped in errors:
        options.leave_out(skipped)


def _folder(sources: Sequence[Path], options: Options) -> Records:
    return caption_records(sources[0], DEFAULT_PROMPT if options.prompt is None else options.prompt)


def _stored(sources: Sequence[Any], options: Options) -> Records:
    for source in sources:
        for number, item in enumerate(stored_items(str(source), options)):
            if isinstance(item, DataError):
                if not isinstance(item, ImageError) and item.first.code != EMPTY_CELL:
                    raise item
                options.leave_out(item)
            else:
                yield options.with_kept(_as_llava(item, str(number)), item.extra)


def output_exists(path: Path) -> UserError:
    """Return the error for a file or folder that a conversion would overwrite."""
    return UserError(
        f"{path} exists already", code="output-exists", hint="nothing was written; name a new --output_dir"
    )


class PictureFolder:
    """A folder that is created with the first picture."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_mine = False  # created by this conversion
        self._used: Counter[str] = Counter()
        self._names: dict[tuple[str, bytes], str] = {}

    def filled(self, records: Records) -> Records:
        """Yield the records after writing their stored pictures; equal names with equal content are written once.

        Raises `UserError` if the folder exists before the first picture is written.
        """
        for value in records:
            for key in ("image", "images"):
                field = value.get(key)
                if isinstance(field, list):
                    value[key] = [self._written(name) for name in field]
                elif field:
                    value[key] = self._written(field)
            yield value

    def remove(self) -> None:
        """Remove the folder if this conversion created it."""
        if self.is_mine:
            shutil.rmtree(self.path, ignore_errors=True)

    def _written(self, picture: Any) -> Any:
        if not isinstance(picture, StoredPicture):
            return picture
        known = (str(picture), hashlib.blake2b(picture.content, digest_size=16).digest())
        if known not in self._names:
            self._names[known] = self._write(picture)
        return self._names[known]

    def _write(self, picture: StoredPicture) -> str:
        if not self.is_mine and self.path.exists():
            raise output_exists(self.path)
        original = Path(picture.replace("\0", ""))  # file systems allow no NUL and at most 255 bytes
        stem, suffix = original.stem[:60] or "picture", original.suffix[:12] or picture_suffix(picture.content)
        name = wanted = f"{stem}{suffix}"
        while name in self._used:
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
        {"from": SPEAKERS[turn.role], "value": turn.text, **(json.loads(turn.call) if turn.call else {})}
        for turn in record.turns
    ]
    tools = {"tools": tools_of(record)} if record.extra.get("tools") else {}
    shown = [{key: part for key, part in video._asdict().items() if part} for video in record.videos]
    videos = {"videos": shown} if shown else {}
    if any(isinstance(name, StoredPicture) for video in record.videos for name in video.files):
        raise DataError("videos inside a table, or frames of them, are not written to files", code="record-videos")
    return {"id": record.id or identifier, **images, **videos, "conversations": turns, **tools}


KINDS: dict[str, SourceFormat] = {
    "llava": SourceFormat(_llava),
    "jsonl": SourceFormat(_llava),
    "messages": SourceFormat(_llava),
    "folder": SourceFormat(_folder, ("prompt",)),
    "table": SourceFormat(table, ("prompt",)),
    "csv": SourceFormat(table, ("prompt",)),
    "hub": SourceFormat(_stored, ("prompt",)),
    "vqav2": SourceFormat(vqa, ("image_pattern",)),
    "okvqa": SourceFormat(vqa, ("image_pattern",)),
    "gqa": SourceFormat(gqa, ("image_pattern",)),
    "vizwiz": SourceFormat(vizwiz, ("image_pattern",)),
    "textvqa": SourceFormat(textvqa, ("image_pattern",)),
    "ocrvqa": SourceFormat(ocrvqa, ("image_pattern", "split")),
    "aokvqa": SourceFormat(aokvqa, ("image_pattern",)),
    "scienceqa": SourceFormat(scienceqa, ("image_pattern", "split")),
    "refcoco": SourceFormat(refcoco, ("image_pattern", "split")),
    "coco": SourceFormat(coco_captions, ("prompt", "image_pattern")),
    "alpaca": SourceFormat(instructions),
}
COMMAND = Command(
    "milora_data convert",
    "Convert another format to LLaVA JSON.",
    """\
formats (--from):
  llava, jsonl   records of LLaVA's format, as a list or one per line; several files are joined into one
  messages       {"messages": [{"role", "content"}], "images": [...]}, used by OpenAI, TRL and others; a list or one per
                 line; base64 pictures, here and in the other formats, are written to images/
  folder         pictures with a text file each (a.jpg, a.txt), or with one table: captions.json, .jsonl or .csv,
                 metadata.csv or .jsonl
  table, csv     rows (.csv, .tsv, .json, .jsonl) with columns for picture, question and answer, or picture and caption
  alpaca         instruction, input and output, or query and response, as in LLM-Adapters and MetaMathQA
  hub            FILE.parquet, FILE.tar (webdataset), a folder of save_to_disk, hub:OWNER/NAME[:SPLIT]; pictures are
                 written to images/
  vqav2, okvqa   the questions file and the annotations file
  gqa, textvqa, vizwiz, ocrvqa, aokvqa   the file with questions and answers
  scienceqa      problems.json            refcoco   refs(...).p and instances.json
  coco           captions_....json

examples:
  python -m milora_data convert --from jsonl a.jsonl b.jsonl --output_dir data
  python -m milora_data convert --from folder my_pictures --output_dir data --prompt "What is this?"
  python -m milora_data convert --from table captions.csv --output_dir data
  python -m milora_data convert --from alpaca instructions.json --output_dir data
  python -m milora_data convert --from vqav2 questions.json annotations.json --output_dir data
  python -m milora_data convert --from gqa questions.json --image_pattern "gqa/images/{}.jpg" --output_dir data
""",
    inputs=(
        option(
            "--from", dest="kind", choices=KINDS, required=True, metavar="FORMAT", help="format of SOURCE, see below"
        ),
        option("sources", nargs="+", metavar="SOURCE", help="file, or folder of pictures"),
    ),
    settings=(
        option("--prompt", help=f'question for pictures with captions (default: "{DEFAULT_PROMPT}")'),
        option("--split", help="split to convert, if a file contains all splits (default: train)"),
        option("--image_pattern", help="file name of a picture from its id, such as coco/{:012d}.jpg"),
        option("--hold_out", type=positive, metavar="N", help="write about N random records to eval.json"),
        option(
            "--hold_out_by",
            metavar="picture|record|FIELD",
            help="what is never divided: records that share a picture (default), each record, or those with an equal "
            "value in this column or key",
        ),
    ),
    outputs=(
        shared("output_dir", required=True, about="folder for data.json, which must not exist"),
        shared("format"),
    ),
)
