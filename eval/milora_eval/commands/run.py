"""`python -m milora_eval run`: load a model once, evaluate it (and its untouched base), print one table."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milora_data.command import count, next_step, parser
from milora_data.errors import DataError, UserError
from milora_data.flags import shared
from milora_eval.answers.runner import Plan, questions
from milora_eval.answers.selection import parse_shard
from milora_eval.answers.target import EvalTarget, eval_target, recipe_of
from milora_eval.benchmark import Benchmark
from milora_eval.evaluate import add_forgetting, results_folder, run, write_table
from milora_eval.scores.exports import SUBMISSION
from milora_eval.scores.results import read_results
from milora_eval.scores.table import FORMATS, show
from milora_eval.suites import find_benchmark, find_suite, has_files, with_protocol
from milora_vl.adapters.folders import holds_adapter
from milora_vl.report.regenerate import rewrite_report

EXAMPLES = """\
examples:
  python -m milora_eval run --model smol-llava --adapter runs/demo --suite emoji --data data/emoji \\
      --with_base --output_dir runs/demo
  python -m milora_eval run --model llava-1.5-7b --suite llava-paper --data playground/data/eval --output_dir out
  python -m milora_eval run --model llava-1.5-7b --benchmarks pope,gqa@official --data data --limit 100 --output_dir out
  python -m milora_eval run --model llava-1.5-7b --benchmarks my_questions.json --output_dir out
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Everything that can be wrong without a model is checked before one is loaded."""
    options = _options(argv)
    who = eval_target(options.model, options.adapter, options.base)
    if options.with_base and not who.has_base:
        raise UserError("--with_base needs something that was trained: --adapter A, or --model RUN with --base B")
    arguments = _arguments(options, who)
    own = (who.folder.resolve(), who.folder.resolve().parent)  # a checkpoint is evaluated into its run
    if holds_adapter(options.output_dir) and options.output_dir.resolve() not in own:
        sys.stderr.write(f"warning: {options.output_dir} holds another adapter; its scores and report are replaced\n")
    sys.stderr.write(f"loading {options.model}" + (f" with {who.adapter}\n" if who.adapter else "\n"))
    folders = _evaluate(options, who, arguments)
    if folders is None:
        sys.stderr.write(f"shard {options.shard} is done; the last one to finish writes the results\n")
        return 0
    _print(options, folders)
    _report(options.output_dir)
    next_step("milora_eval", "view", *folders)
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser("python -m milora_eval run", "Ask a model, score its answers, compare with its base.", EXAMPLES)
    given = options.add_argument_group("input")
    shared(given, "model", required=True)
    shared(given, "adapter")
    shared(given, "base")
    what = given.add_mutually_exclusive_group(required=True)
    shared(what, "suite")
    what.add_argument("--benchmarks", metavar="a,b", help="names, or your own: FILE.json, FILE.py, module:Class")
    shared(given, "data", about="with the benchmarks' files, or your FILE.json's pictures (default: data/SUITE)")
    settings = options.add_argument_group("settings")
    settings.add_argument("--with_base", action="store_true", help="evaluate the untouched base model too")
    shared(settings, "limit", about="N items of each benchmark, a part of any larger N's")
    settings.add_argument("--protocol", metavar="NAME", help="official or llava, for the benchmarks that have both")
    shared(settings, "template")
    shared(settings, "batch_size", default=32, about="questions at a time (default: %(default)s)")
    settings.add_argument("--audit", type=count, default=0, help="ask N items again, one by one, and compare")
    settings.add_argument(
        "--forgetting_tokens",
        type=count,
        default=8192,
        help="of general text; 0: no forgetting number (default: %(default)s)",
    )
    settings.add_argument("--shard", default="1/1", metavar="i/n", help="the i-th of n parts; all write to one folder")
    shared(settings, "device")
    shared(settings, "dtype")
    out = options.add_argument_group("output")
    shared(out, "output_dir", required=True, about="files go to FOLDER/eval/SUITE/...")
    shared(out, "format", choices=FORMATS)
    parsed: argparse.Namespace = options.parse_args(argv)
    return parsed


def _arguments(options: argparse.Namespace, who: EvalTarget) -> dict[str, Any]:
    """Return what `evaluate.run` takes, checked; reads the questions once to find missing data early."""

    if options.suite is not None:
        suite = find_suite(options.suite)
        names, name, limit, partial = suite.benchmarks, options.suite, options.limit or suite.limit, suite.partial
    else:
        names = tuple(part.strip() for part in options.benchmarks.split(",") if part.strip())
        name, limit, partial = None, options.limit, False
        if not names:
            raise UserError("--benchmarks names none\nsee: python -m milora_eval ls")
    data = options.data or Path("data") / (options.suite or names[0])
    if options.protocol is not None:
        names = tuple(_with_protocol(names, options.protocol))
    benchmarks = [find_benchmark(entry) for entry in names]
    if partial:
        benchmarks = [benchmark for benchmark in benchmarks if _is_there(benchmark, data, limit)]
        if not benchmarks:
            raise UserError(f"no benchmark's files are in {data}\nsee: python -m milora_eval ls --data {data}")
    else:
        questions(Plan(benchmarks=tuple(benchmarks), data_dir=data, limit=limit))
    own = recipe_of(who.folder)
    return {
        "benchmarks": benchmarks,
        "data_dir": data,
        "output_dir": options.output_dir,
        "suite": name or "+".join(benchmark.name for benchmark in benchmarks),
        "limit": limit,
        "shard": parse_shard(options.shard),
        "batch_size": options.batch_size,
        "audit_items": options.audit,
        "template": options.template or own.get("template") or "vicuna_v1",
        "image_aspect_ratio": own.get("image_aspect_ratio") or "pad",
    }


def _is_there(benchmark: Benchmark, data: Path, limit: int | None) -> bool:
    """Tell whether a benchmark's files are in a folder: its own, not others' of the same name, such as test.json."""

    if not has_files(benchmark, data):
        return False
    try:
        questions(Plan(benchmarks=(benchmark,), data_dir=data, limit=limit))
    except DataError as error:
        sys.stderr.write(f"left out: {error}\n")
        return False
    return True


def _with_protocol(names: Sequence[str], protocol: str) -> list[str]:
    """Return the names with the protocol where they have it; UserError where none does."""
    chosen = [with_protocol(name, protocol) for name in names]
    if not any(protocol in find_benchmark(name).protocols for name in names):
        known = sorted({own for name in names for own in find_benchmark(name).protocols})
        raise UserError(f"--protocol {protocol}: none of these benchmarks has it\ntheirs are: {', '.join(known)}")
    return chosen


def _evaluate(options: argparse.Namespace, who: EvalTarget, arguments: dict[str, Any]) -> list[Path] | None:
    """Evaluate base and tuned model as asked; returns their results folders, None while shards are missing."""
    from peft import PeftModel

    from milora_vl.forgetting.measure import hides_its_base

    model, processor = _load(options, who.model, who.adapter)
    base = None
    if (who.base or options.with_base or isinstance(model, PeftModel)) and not hides_its_base(model):
        base, _ = _load(options, who.base or who.model, None)
    done = []
    if options.with_base:
        with contextlib.nullcontext() if base is not None else model.disable_adapter():
            done.append(run(base or model, processor, which="base", model_name=who.base or who.model, **arguments))
    done.append(run(model, processor, which=who.which, model_name=who.model, adapter=who.adapter, **arguments))
    if not all(done):
        return None
    folders = [results_folder(options.output_dir, arguments["suite"], result["which"]) for result in done if result]
    if options.forgetting_tokens and (base is not None or hides_its_base(model)):
        sys.stderr.write(f"text forgetting on {options.forgetting_tokens:,} tokens of general text\n")
        key = str((done[-1] or {})["generation"]["key"])
        add_forgetting(folders[-1], model, processor, base, key, options.forgetting_tokens)
    return folders


def _load(options: argparse.Namespace, name: str, adapter: Path | None) -> tuple[Any, Any]:
    from milora_vl.load import load_model
    from milora_vl.models.devices import device_named, dtype_named

    device = device_named(options.device)
    return load_model(name, adapter=adapter, dtype=dtype_named(options.dtype, device), device=device)


def _print(options: argparse.Namespace, folders: list[Path]) -> None:

    results = [read_results(folder) for folder in folders]
    if options.format == "json":
        sys.stdout.write(
            json.dumps({result["which"]: result for result in results}, ensure_ascii=False, indent=1) + "\n"
        )
    else:
        show(write_table(folders[-1]), options.format)
    for result in results:
        if result.get("audit"):
            sys.stderr.write(f"audit of {result['which']}: {result['audit']['changed']} of {result['audit']['n']} ")
            sys.stderr.write("answers changed when asked one by one\n")
    sys.stderr.write("written: " + ", ".join(map(str, folders)) + "\n")
    uploads = [folder / SUBMISSION for folder in folders if (folder / SUBMISSION).is_dir()]
    if uploads:
        sys.stderr.write("for servers and official scripts: " + ", ".join(map(str, uploads)) + "\n")


def _report(output_dir: Path) -> None:
    """Write the run's report anew and put the scores into its card; it cannot fail the evaluation."""
    if not (output_dir / "recipe.yaml").is_file():
        return
    from milora_vl.report.model_card import update_scores

    update_scores(output_dir)
    rewrite_report(output_dir)
