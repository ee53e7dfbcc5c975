"""`python -m milora_eval score`: score stored answers or another program's predictions, without a model."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from milora_data.keys import digest, file_key
from milora_eval.answers.questions import select
from milora_eval.answers.store import PREDICTIONS, to_line, write_lines
from milora_eval.benchmark import Benchmark, content_of
from milora_eval.commands.flags import PLUGIN, PROTOCOL
from milora_eval.data_files import load_items
from milora_eval.registry import find_benchmark, folder_of, import_plugins, with_protocol
from milora_eval.scores.exports import export, join, read_llava_answers, read_predictions
from milora_eval.scores.results import Results, numbers, read_results, write_results
from milora_eval.scores.table import score, write_table, write_tables
from milora_vl.common.cli.console import next_step
from milora_vl.common.cli.parser import Command, option, shared
from milora_vl.common.cli.table import FORMATS, show
from milora_vl.common.errors import UserError
from milora_vl.models.generate import Reply

COMMAND = Command(
    "milora_eval score",
    "Score stored answers or another program's predictions, without a model.",
    """\
examples:
  python -m milora_eval score runs/one/eval/llava-paper/final
  python -m milora_eval score merge.jsonl --benchmark gqa --data playground/data/eval      (LLaVA's answers file)
  python -m milora_eval score MODEL_MMBench_DEV_EN.xlsx --benchmark mmbench --data data     (VLMEvalKit's)
""",
    inputs=(
        option("folder", type=Path, metavar="PATH", help="results folder, or file with predictions"),
        option("--benchmark", metavar="NAME", help="benchmark of the predictions in a file"),
        shared("data", about="folder with the files of that benchmark"),
    ),
    settings=(
        PLUGIN,
        PROTOCOL,
        shared("limit", about="score the same N items as `run --limit N`"),
    ),
    outputs=(
        shared("output_dir", about="output folder; results go to FOLDER/eval/BENCHMARK/FILE"),
        shared("format", choices=FORMATS),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    options = COMMAND.parse(argv)
    import_plugins(options.plugin)
    path = options.folder
    if path.is_file() and path.name == PREDICTIONS and options.benchmark is None:
        path = path.parent
    if path.is_file():
        return _score_file(options, path)
    flags = [flag for flag in ("benchmark", "protocol", "data", "limit", "output_dir") if getattr(options, flag)]
    if flags:
        message = f"this flag is for a file with predictions; the answers in {path} already name their benchmark"
        raise UserError(message, where=f"--{flags[0]}")
    results = score(path)
    _print(options, path, results)
    for file in export(path):
        sys.stderr.write(f"written: {file}\n")
    next_step("milora_eval", "view", path)
    return 0


def _score_file(options: argparse.Namespace, path: Path) -> int:
    if options.benchmark is None or options.data is None:
        message = f"{path} is a file with predictions: --benchmark NAME and --data DIR are required"
        raise UserError(message, code="flag-required", hint=COMMAND.examples.rstrip())
    name = options.benchmark
    if options.protocol:
        (name,) = with_protocol([name], options.protocol)
    benchmark = find_benchmark(name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.output_dir is not None:
            folder = options.output_dir / "eval" / benchmark.name / path.stem
            if (folder / PREDICTIONS).exists():
                hint = "choose another --output_dir"
                raise UserError(f"{folder} holds results already", code="output-exists", hint=hint)
            folder.mkdir(parents=True, exist_ok=True)
        results = _results(benchmark, path, options, folder)
        _print(options, folder, results)
        if options.output_dir is not None:
            export(folder)
            sys.stderr.write(f"written: {folder}\n")
            next_step("milora_eval", "view", folder)
        else:
            asked = ("--benchmark", name, "--data", options.data, "--output_dir", "FOLDER")
            next_step("milora_eval", "score", path, *asked)
    return 0


def _results(benchmark: Benchmark, path: Path, options: argparse.Namespace, folder: Path) -> Results:
    data = folder_of(benchmark, options.data)
    items = select(list(load_items(benchmark, data)), options.limit)
    texts = join(benchmark, items, _rows(path), path)
    keys = {item.id: digest([str(path), item.id]) for item in items}
    read = cache(file_key)
    pairs = ((item, Reply(texts[item.id])) for item in items)
    lines = (to_line(benchmark, item, reply, keys[item.id], data, content_of(item, read)) for item, reply in pairs)
    write_lines(folder / PREDICTIONS, lines)
    about = {"suite": benchmark.name, "which": path.stem, "model": str(path), "adapter": None}
    results = about | {"data": str(options.data), "limit": options.limit} | numbers(folder, benchmark.name)
    write_results(folder, results)
    write_tables(folder)
    return read_results(folder)


def _rows(path: Path) -> Sequence[Mapping[str, Any]]:
    return read_llava_answers(path) if path.suffix in (".jsonl", ".json") else read_predictions(path)


def _print(options: argparse.Namespace, folder: Path, results: Results) -> None:
    table = write_table(folder)
    if options.format == "json":
        sys.stdout.write(json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    else:
        show(table, options.format)
