"""`python -m milora_data convert`: LLaVA JSON out of other formats."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from .captions import caption_records
from .command import amount, next_step, parser, positive
from .embedded import stored_pictures
from .errors import DataError, UserError
from .flags import shared
from .images import ImageError
from .instructions import held_out, instructions
from .jsonfile import read_objects, write_objects
from .messages import from_messages
from .other_files import DEFAULT_PROMPT, coco_captions, refcoco, sharegpt, table
from .records import Record, load_records, parse_record
from .stored import stored_items
from .vqa_files import Converter, Options, Records, aokvqa, gqa, ocrvqa, scienceqa, textvqa, vizwiz, vqa
from .written import PictureFolder, already_there

EPILOG = """\
formats (--from):
  llava, jsonl   records of LLaVA's format, as a list or one a line; several files become one
  messages       {"messages": [{"role", "content"}], "images": [...]}, as OpenAI, TRL and others use; a list or one a
                 line; pictures in base64, here and in the other formats, are written to images/
  folder         pictures with a text file each (a.jpg, a.txt), or with one table: captions.json, .jsonl or .csv,
                 metadata.csv or .jsonl
  table, csv     rows (.csv, .tsv, .json, .jsonl) with columns for picture, question and answer, or picture and caption
  alpaca         instruction, input and output, or query and response, as LLM-Adapters and MetaMathQA have them
  hub            FILE.parquet, FILE.tar (webdataset), a folder of save_to_disk, hub:OWNER/NAME[:SPLIT]; pictures are
                 written to images/
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
    images, out = PictureFolder(chosen.output_dir / "images"), chosen.output_dir / "data.json"
    new = [out, *([chosen.output_dir / "eval.json"] if chosen.hold_out else [])]
    if there := [path for path in [*new, *([images.path] * (chosen.kind == "hub"))] if path.exists()]:
        raise UserError(already_there(there[0]))
    given = Options(chosen.prompt, chosen.split or "train", chosen.image_pattern)
    sources = chosen.sources if chosen.kind == "hub" else [Path(source) for source in chosen.sources]
    try:
        records = _some(images.filled(_read(chosen.kind, sources, given)), chosen, given.left_out)
        if chosen.hold_out:
            records = _without_held_out(list(records), chosen.hold_out, chosen.output_dir / "eval.json")
        count = write_objects(out, records)
    except BaseException:  # Ctrl-C too: what is left would be in the way of the next try
        for path in new:
            path.unlink(missing_ok=True)
        images.remove()
        raise
    _say_left_out(given.left_out)
    more: dict[str, Any] = {"held_out": str(chosen.output_dir / "eval.json")} if chosen.hold_out else {}
    more |= {"left_out": len(given.left_out)} if given.left_out else {}
    as_json = json.dumps({"file": str(out), "records": count, **more})
    sys.stdout.write(as_json + "\n" if chosen.format == "json" else f"{out}: {amount(count, 'record')}\n")
    if images.is_mine and images.num_elsewhere:
        number = amount(images.num_elsewhere, "record")
        sys.stderr.write(f"{number} with picture files, not embedded pictures: put the files into {images.path} too\n")
    folder = sources[0] if chosen.kind == "folder" else images.path if images.is_mine else "FOLDER"
    has_pictures = any(record.images for record in load_records(out))
    next_step("milora_data", "check", out, *(["--image_folder", folder] if has_pictures else []))
    return 0


def _say_left_out(lines: Sequence[str]) -> None:
    """Name the first records without which the file was written."""
    for line in lines[:5]:
        sys.stderr.write(f"left out: {line}\n")
    if len(lines) > 5:
        sys.stderr.write(f"left out: {len(lines) - 5:,} more records with such pictures\n")


def _some(records: Records, chosen: argparse.Namespace, left_out: Sequence[str]) -> Records:
    """Return the records; UserError where there is none."""
    first = next(records, None)
    if first is None:
        split = f" of split {chosen.split or 'train'} (--split)" if "split" in KINDS[chosen.kind].flags else ""
        broken = "".join(f"{line}\n" for line in left_out[:5])
        raise UserError(f"{broken}{', '.join(chosen.sources)}: no record{split}\nnothing was written")
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


def _llava(sources: Sequence[Path], options: Options) -> Records:
    for source in sources:
        for place, value in read_objects(source):
            parse_record(value, source=f"{source}:{place}", embedded="keep")
            assert isinstance(value, dict)
            yield from stored_pictures(value, f"{source}:{place}", options.left_out)


def _messages(sources: Sequence[Path], options: Options) -> Records:
    for source in sources:
        for number, (place, value) in enumerate(read_objects(source), start=1):
            try:
                made = from_messages(value, number=number)
            except DataError as error:
                raise DataError(f"{source}:{place}: {error}") from None
            yield from stored_pictures(made, f"{source}:{place}", options.left_out)


def _folder(sources: Sequence[Path], options: Options) -> Records:
    return caption_records(sources[0], DEFAULT_PROMPT if options.prompt is None else options.prompt)


def _stored(sources: Sequence[Any], options: Options) -> Records:
    for source in sources:
        for number, item in enumerate(stored_items(str(source), options)):
            if isinstance(item, ImageError):
                options.left_out.append(str(item))
            elif isinstance(item, DataError):
                raise item
            else:
                yield _as_llava(item, str(number))


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
