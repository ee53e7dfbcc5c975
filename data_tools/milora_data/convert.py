"""`python -m milora_data convert`: LLaVA JSON out of other formats. Pictures stay where they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .captions import caption_records
from .command import parser
from .errors import DataError, UserError
from .jsonfile import read_objects, write_objects
from .messages import from_messages
from .records import parse_record

EPILOG = """\
formats (--from):
  llava, jsonl   records of LLaVA's format, as a list or one a line; several files become one
  messages       {"messages": [{"role", "content"}], "images": [...]}, as TRL and others use; a list or one a line
  folder         pictures with a text file each (a.jpg, a.txt), or with one table: captions.json, .jsonl or .csv,
                 metadata.csv or .jsonl

examples:
  python -m milora_data convert --from jsonl a.jsonl b.jsonl --output_dir data
  python -m milora_data convert --from folder my_pictures --output_dir data --prompt "What is this?"
"""
DEFAULT_PROMPT = "Describe this picture."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parser("python -m milora_data convert", "Make LLaVA JSON of another format.", EPILOG)
    options.add_argument("--from", dest="kind", choices=KINDS, required=True, help="format of SOURCE")
    options.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help="file, or folder of pictures")
    options.add_argument("--output_dir", type=Path, required=True, help="folder for data.json, which must not exist")
    options.add_argument("--prompt", help=f'with --from folder: what is asked (default: "{DEFAULT_PROMPT}")')
    chosen = options.parse_args(argv)
    if chosen.prompt is not None and chosen.kind != "folder":
        raise UserError(f"--prompt is for --from folder; records of --from {chosen.kind} hold their questions")
    if chosen.kind == "folder" and len(chosen.sources) > 1:
        raise UserError("--from folder takes one folder, to which the names of the pictures are relative")
    out = chosen.output_dir / "data.json"
    convert = KINDS[chosen.kind]
    prompt = DEFAULT_PROMPT if chosen.prompt is None else chosen.prompt
    count = write_objects(out, (value for source in chosen.sources for value in convert(source, prompt)))
    sys.stdout.write(f"{out}: {count:,} records\n")
    folder = chosen.sources[0] if chosen.kind == "folder" else "FOLDER"
    sys.stderr.write(f"next: python -m milora_data check {out} --image_folder {folder}\n")
    return 0


def _llava(source: Path, prompt: str) -> Iterator[dict[str, Any]]:
    for line, value in read_objects(source):
        parse_record(value, source=f"{source}:{line}")
        assert isinstance(value, dict)
        yield value


def _messages(source: Path, prompt: str) -> Iterator[dict[str, Any]]:
    for line, value in read_objects(source):
        try:
            yield from_messages(value, number=line)
        except DataError as error:
            raise DataError(f"{source}:{line}: {error}") from None


KINDS: dict[str, Callable[[Path, str], Iterator[dict[str, Any]]]] = {
    "llava": _llava,
    "jsonl": _llava,
    "messages": _messages,
    "folder": caption_records,
}
