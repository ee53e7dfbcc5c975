"""`python -m milora_data convert`: LLaVA JSON out of other formats."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from milora_data.captions import caption_records
from milora_data.command import amount, next_step, parser, positive
from milora_data.errors import DataError, UserError
from milora_data.flags import shared
from milora_data.images import StoredPicture
from milora_data.instructions import held_out, instructions
from milora_data.jsonfile import read_objects, write_objects
from milora_data.messages import from_messages
from milora_data.other_files import DEFAULT_PROMPT, coco_captions, refcoco, sharegpt, table
from milora_data.records import Record, load_records, parse_record
from milora_data.stored import stored_records
from milora_data.vqa_files import Converter, Options, Records, aokvqa, gqa, ocrvqa, scienceqa, textvqa, vizwiz, vqa

EPILOG = """\
formats (--from):
  llava, jsonl   records of LLaVA's format, as a list or one a line; several files become one
  messages       {"messages": [{"role", "content"}], "images": [...]}, as TRL and others use; a list or one a line
  folder         pictures with a text file each (a.jpg, a.txt), or with one table: captions.json, .jsonl or .csv,
                 metadata.csv or .jsonl
  table, csv     rows (.csv, .tsv, .json, .jsonl) with columns for picture, question and answer, or picture and caption
  alpaca         instruction, input and output, or query and response, as LLM-Adapters and MetaMathQA have them
  hub            FILE.parquet, FILE.tar (webdataset), hub:OWNER/NAME[:SPLIT]; pictures are written to images/
  vqav2, okvqa   the questions file and the annotations file
  gqa, textvqa, vizwiz, ocrvqa, aokvqa   the file of questions and answers
  scienceqa      problems.json            refcoco   refs(...).p and instances.json
  coco           captions_....json        sharegpt  conversations without pictures

examples:
  python -m milora_data convert --from jsonl a.jsonl b.jsonl --output_dir data
  python -m milora_data convert --from folder my_pictures --output_dir data --prompt "What is this?"
  python -m milora_data convert --from table captions.csv --output_dir data
  python -m milora_data convert --from alpaca instructions.json --output_dir data
  python -m milora_data convert --from vqav2 questions.json annotations.json --output_dir data
  python -m milora_data convert --from gqa questions.json --image_pattern "gqa/images/{}.jpg" --output_dir data
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """One format: how it is read, and which of the flags say something about it."""

    convert: Converter
    flags: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parser("python -m milora_data convert", "Make LLaVA JSON of another format.", EPILOG)
    read = options.add_argument_group("input")
    read.add_argument("--from", dest="kind", choices=KINDS, required=True, metavar="FORMAT", help="of SOURCE")
    read.add_argument("sources", nargs="+", metavar="SOURCE", help="file, or folder of pictures")
    settings = options.add_argument_group("settings")
    settings.add_argument("--prompt", help=f'what is asked about a caption\'s picture (default: "{DEFAULT_PROMPT}")')
    settings.add_argument("--split", help="of sets whose file holds all splits (default: train)")
    settings.add_argument("--image_pattern", help="file name of a picture from its id, such as coco/{:012d}.jpg")
    settings.add_argument("--hold_out", type=positive, metavar="N", help="N records, drawn at random, go to eval.json")
    written = options.add_argument_group("output")
    shared(written, "output_dir", required=True, about="folder for data.json, which must not exist")
    shared(written, "format")
    chosen = options.parse_args(argv)
    _check_flags(chosen)
    images, out = chosen.output_dir / "images", chosen.output_dir / "data.json"
    new = [out, *([chosen.output_dir / "eval.json"] if chosen.hold_out else []), *([images] * (chosen.kind == "hub"))]
    if there := [path for path in new if path.exists()]:
        raise UserError(f"{there[0]} exists already\nnothing was written; name a new --output_dir")
    given = Options(chosen.prompt, chosen.split or "train", chosen.image_pattern)
    sources = chosen.sources if chosen.kind == "hub" else [Path(source) for source in chosen.sources]
    try:
        records = _some(_with_written_pictures(_read(chosen.kind, sources, given), images), chosen)
        if chosen.hold_out:
            records = _without_held_out(list(records), chosen.hold_out, chosen.output_dir / "eval.json")
        count = write_objects(out, records)
    except BaseException:  # Ctrl-C too: what is left would be in the way of the next try
        for path in new:
            shutil.rmtree(path, ignore_errors=True) if path == images else path.unlink(missing_ok=True)
        raise
    held_out_file = {"held_out": str(chosen.output_dir / "eval.json")} if chosen.hold_out else {}
    as_json = json.dumps({"file": str(out), "records": count, **held_out_file})
    sys.stdout.write(as_json + "\n" if chosen.format == "json" else f"{out}: {amount(count, 'record')}\n")
    folder = {"folder": sources[0], "hub": images}.get(chosen.kind, "FOLDER")
    has_pictures = any(record.images for record in load_records(out))
    next_step("milora_data", "check", out, *(["--image_folder", folder] if has_pictures else []))
    return 0


def _some(records: Records, chosen: argparse.Namespace) -> Records:
    """Return the records; UserError where there is none."""
    first = next(records, None)
    if first is None:
        split = f" of split {chosen.split or 'train'} (--split)" if "split" in KINDS[chosen.kind].flags else ""
        raise UserError(f"{', '.join(chosen.sources)}: no record{split}\nnothing was written")
    return chain([first], records)


def _without_held_out(records: list[dict[str, Any]], count: int, path: Path) -> Records:
    """Yield the records but for some, which are written to `path`."""
    chosen = held_out(len(records), count)
    write_objects(path, (value for number, value in enumerate(records) if number in chosen))
    sys.stderr.write(f"{path}: {amount(count, 'record')}\n")
    yield from (value for number, value in enumerate(records) if number not in chosen)


def _check_flags(chosen: argparse.Namespace) -> None:
    for flag in ("prompt", "split", "image_pattern"):
        if vars(chosen)[flag] is not None and flag not in KINDS[chosen.kind].flags:
            kinds = ", ".join(name for name, kind in KINDS.items() if flag in kind.flags)
            raise UserError(f"--{flag} is for --from {kinds}; --from {chosen.kind} has no use for it")
    if chosen.kind == "folder" and len(chosen.sources) > 1:
        raise UserError("--from folder takes one folder, to which the names of the pictures are relative")


def _read(kind: str, sources: Sequence[Any], options: Options) -> Records:
    """Yield the records; a file that is not of its kind is said to be none."""
    try:
        yield from KINDS[kind].convert(sources, options)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        names = ", ".join(map(str, sources))
        what = f"no {error} in it" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{names}: not what --from {kind} expects: {what}") from None


def _with_written_pictures(records: Records, folder: Path) -> Records:
    """Yield the records after their stored pictures have been written to `folder`, which names them."""
    used: Counter[str] = Counter()
    for value in records:
        images = value.get("image")
        if isinstance(images, StoredPicture):
            value["image"] = _write_picture(images, folder, used)
        elif isinstance(images, list):
            value["image"] = [_write_picture(i, folder, used) if isinstance(i, StoredPicture) else i for i in images]
        yield value


def _write_picture(picture: StoredPicture, folder: Path, used: Counter[str]) -> str:
    named = Path(picture.replace("\0", ""))  # a name may be anything: no file system takes NUL, or 256 bytes
    stem, suffix = named.stem[:60] or "picture", named.suffix[:12] or _suffix(picture.content)
    name = wanted = f"{stem}{suffix}"
    while name in used:
        used[wanted] += 1
        name = f"{stem}-{used[wanted]}{suffix}"
    used[name] = 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(picture.content)
    return name


def _suffix(content: bytes) -> str:
    signs = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"GI": ".gif", b"RI": ".webp", b"BM": ".bmp"}
    return signs.get(content[:2], ".img")


def _llava(sources: Sequence[Path], options: Options) -> Records:
    for source in sources:
        for place, value in read_objects(source):
            parse_record(value, source=f"{source}:{place}")
            assert isinstance(value, dict)
            yield value


def _messages(sources: Sequence[Path], options: Options) -> Records:
    for source in sources:
        for number, (place, value) in enumerate(read_objects(source), start=1):
            try:
                yield from_messages(value, number=number)
            except DataError as error:
                raise DataError(f"{source}:{place}: {error}") from None


def _folder(sources: Sequence[Path], options: Options) -> Records:
    return caption_records(sources[0], DEFAULT_PROMPT if options.prompt is None else options.prompt)


def _stored(sources: Sequence[Any], options: Options) -> Records:
    for source in sources:
        for number, record in enumerate(stored_records(str(source), options)):
            yield _as_llava(record, str(number))


def _as_llava(record: Record, identifier: str) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    images = {"image": record.images[0] if len(record.images) == 1 else list(record.images)} if record.images else {}
    turns = [{"from": names[turn.role], "value": turn.text} for turn in record.turns]
    return {"id": record.id or identifier, **images, "conversations": turns}


KINDS: dict[str, Kind] = {
    "llava": Kind(_llava),
    "jsonl": Kind(_llava),
    "messages": Kind(_messages),
    "folder": Kind(_folder, ("prompt",)),
    "table": Kind(table, ("prompt",)),
    "csv": Kind(table, ("prompt",)),
    "hub": Kind(_stored, ("prompt",)),
    "vqav2": Kind(vqa, ("image_pattern",)),
    "okvqa": Kind(vqa, ("image_pattern",)),
    "gqa": Kind(gqa, ("image_pattern",)),
    "vizwiz": Kind(vizwiz, ("image_pattern",)),
    "textvqa": Kind(textvqa, ("image_pattern",)),
    "ocrvqa": Kind(ocrvqa, ("image_pattern", "split")),
    "aokvqa": Kind(aokvqa, ("image_pattern",)),
    "scienceqa": Kind(scienceqa, ("image_pattern", "split")),
    "refcoco": Kind(refcoco, ("image_pattern", "split")),
    "coco": Kind(coco_captions, ("prompt", "image_pattern")),
    "sharegpt": Kind(sharegpt),
    "alpaca": Kind(instructions),
}
