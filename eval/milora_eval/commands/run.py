"""`python -m milora_eval run`: load a model once, evaluate it (and optionally its base), print one table."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from milora_data.encode.templates import OWN, template_name
from milora_eval.answers.questions import EvaluationPlan, Items, parse_shard, plan_of
from milora_eval.answers.target import EvalTarget, eval_target
from milora_eval.commands.flags import PROTOCOL
from milora_eval.registry import choose, data_folder
from milora_eval.scores.exports import SUBMISSION
from milora_eval.scores.results import read_results
from milora_eval.scores.table import scales_table, write_table
from milora_vl.common.cli.console import next_step
from milora_vl.common.cli.parser import OR_ADAPTER, Command, count, flag, from_zero, option, positive, shared
from milora_vl.common.cli.table import FORMATS, show
from milora_vl.common.errors import Problem, UserError, at_flag
from milora_vl.core.adapter.folders import holds_adapter, model_of
from milora_vl.report.model_card import update_scores
from milora_vl.report.page import regenerate_report

BATCH_SIZE, CONCURRENCY, FORGETTING_TOKENS = 32, 16, 8192


def scales(text: str) -> tuple[float, ...]:
    return tuple(from_zero(part) for part in text.split(","))


COMMAND = Command(
    "milora_eval run",
    "Run benchmarks on a model and compare it with its base.",
    """\
examples:
  python -m milora_eval run --model smol-llava --adapter runs/demo --suite emoji --data data/emoji \\
      --with_base --output_dir runs/demo
  python -m milora_eval run --model llava-1.5-7b --suite llava-paper --data playground/data/eval --output_dir out
  python -m milora_eval run --model llava-1.5-7b --benchmarks pope,gqa@official --data data --limit 100 --output_dir out
  python -m milora_eval run --model llava-1.5-7b --benchmarks my_questions.json --output_dir out
  python -m milora_eval run --adapter runs/demo --scale 0,0.5,1 --suite emoji --data data/emoji --output_dir runs/demo
  python -m milora_eval run --server http://localhost:8000/v1 --served_model merged --suite emoji --output_dir out
""",
    inputs=(
        shared("model", about=OR_ADAPTER),
        shared("adapter"),
        shared("base"),
        (
            shared("suite", about="list of benchmarks, or FILE.json; see: python -m milora_eval ls"),
            option("--benchmarks", metavar="a,b", help="names, or your own: FILE.json, FILE.py, module:Class"),
        ),
        shared(
            "data",
            about="folder with the benchmark files, or with the pictures of your FILE.json (default: data/SUITE)",
        ),
        option("--server", metavar="URL", help="server with OpenAI's interface, up to /v1; key: OPENAI_API_KEY"),
        option("--served_model", metavar="NAME", help="name of the model on the --server"),
    ),
    settings=(
        option(
            "--scale",
            type=scales,
            default=(1.0,),
            metavar="X,Y",
            help="sizes of the finished update: 1 as trained, 0.5 half of it, 0 the base (default: 1)",
        ),
        flag("--with_base", "also evaluate the base model"),
        shared("limit", about="number of items per benchmark; a larger N contains the items of a smaller one"),
        PROTOCOL,
        shared("template"),
        shared("batch_size", default=BATCH_SIZE, about="questions per batch (default: %(default)s)"),
        option(
            "--forgetting_tokens",
            type=count,
            default=FORGETTING_TOKENS,
            help="tokens of text to measure forgetting on, besides drawn shapes; 0 skips both (default: %(default)s)",
        ),
        option("--shard", default="1/1", metavar="i/n", help="evaluate part i of n; all parts write to one folder"),
        shared("device"),
        shared("dtype"),
        option(
            "--concurrency",
            type=positive,
            metavar="N",
            help=f"questions that the --server gets at once (default: {CONCURRENCY})",
        ),
    ),
    outputs=(
        shared("output_dir", required=True, about="output folder; files go to FOLDER/eval/SUITE/..."),
        shared("format", choices=FORMATS),
    ),
)
# Flags that have no effect with and without --server.
OF_LOADED = "model adapter base template device dtype with_base scale batch_size forgetting_tokens".split()
OF_SERVED = ["served_model", "concurrency"]


def main(argv: Sequence[str] | None = None) -> int:
    options = COMMAND.parse(argv)
    _refuse_unused(options)
    target = _target(options) if options.server is None else None
    plan, items = planned(options, target)
    key = "" if target is not None else api_key()
    if target is not None:
        _announce(options, target)
    from milora_eval.run_suite import run_loaded, run_served

    if target is not None:
        folders = run_loaded(target, plan, items, options.output_dir, options.forgetting_tokens)
    else:
        folders = run_served(options.server, key, options.served_model, plan, items, options.output_dir)
    if folders is None:
        sys.stderr.write(f"shard {options.shard} is complete; the last shard to finish writes the results\n")
        return 0
    _print(options, folders)
    if target is not None:
        _report(options.output_dir)
    if target is not None and target.adapter is not None and len(options.scale) > 1:
        next_step("milora_vl.export", target.adapter, "--scale", "X", "--to", "adapter")
    else:
        next_step("milora_eval", "view", *folders[-2:])
    return 0


def _refuse_unused(options: argparse.Namespace) -> None:
    """Raise UserError with a problem for each flag that was given and has no effect."""
    names, why, hint = OF_SERVED, "belongs to a --server", "add:  --server URL"
    if options.server is not None:
        names, why, hint = OF_LOADED, "has no effect on a model on a server", "remove it, or --server"
    defaults = vars(COMMAND.parse(["--suite", "", "--output_dir", str(options.output_dir)]))
    given = [name for name in names if getattr(options, name) != defaults[name]]
    if given:
        raise UserError(problems=[Problem(why, where=f"--{name}", hint=hint) for name in given])


def api_key() -> str:
    """Return the key of the server; empty without one, because many servers need none."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY holds no key of ASCII characters", where="--server")
    return key


def _target(options: argparse.Namespace) -> EvalTarget:
    options.model = model_of(options.model, options.adapter, "milora_eval", "run", "--adapter")
    return eval_target(
        options.model,
        options.adapter,
        options.base,
        options.scale,
        with_base=options.with_base,
        dtype=options.dtype,
        device=options.device,
    )


def _announce(options: argparse.Namespace, target: EvalTarget) -> None:
    run_folders = (target.folder.resolve(), target.folder.resolve().parent)  # a checkpoint is evaluated into its run
    if holds_adapter(options.output_dir) and options.output_dir.resolve() not in run_folders:
        sys.stderr.write(f"warning: {options.output_dir} holds another adapter; its scores and report are replaced\n")
    sys.stderr.write(f"loading {options.model}" + (f" with {target.adapter}\n" if target.adapter else "\n"))


def planned(options: argparse.Namespace, target: EvalTarget | None) -> tuple[EvaluationPlan, Items]:
    """Return the plan of --suite or --benchmarks, and the items of its benchmarks, which are read once.

    Without a target, a server answers, in the chat template of its model. Raises UserError for missing data.
    """
    value, name = (options.suite, "suite") if options.suite is not None else (options.benchmarks, "benchmarks")
    if options.template is not None:
        with at_flag("--template"):
            template_name(options.template)
    with at_flag("--data"):
        data = data_folder(value, options.data)
    with at_flag(f"--{name}"):
        chosen = choose(value, options.protocol, data_dir=data, run=options.output_dir)
    plan, items = plan_of(chosen, data, options.limit)
    from milora_vl.models.prompts import Prompts, prompts_of

    prompts = Prompts(OWN, "plain") if target is None else prompts_of(target.model, target.adapter, options.template)
    plan = replace(
        plan,
        template=prompts.template,
        image_aspect_ratio=prompts.image_aspect_ratio,
        batch_size=options.batch_size if target else options.concurrency or CONCURRENCY,
        shard=parse_shard(options.shard),
    )
    return plan, items


def _print(options: argparse.Namespace, folders: list[Path]) -> None:
    table = write_table(folders[-1])  # with the forgetting, which is measured after the answers
    results = [read_results(folder) for folder in folders]
    if options.format == "json":
        by_model = {result["which"]: result for result in results}
        sys.stdout.write(json.dumps(by_model, ensure_ascii=False, indent=1) + "\n")
    else:
        if len(options.scale) > 1:
            sizes = {0.0 if result["which"] == "base" else result.get("scale", 1.0): result for result in results}
            table = scales_table(sizes, results[-1]["suite"])
        show(table, options.format)
    for result in results:
        for entry in result["benchmarks"]:
            if entry["truncated"]:
                limit = result["generation"]["max_new_tokens"][entry["name"]]
                sys.stderr.write(f"truncated: {entry['truncated']:,} of {entry['n']:,} answers of {result['which']} ")
                sys.stderr.write(f"to {entry['name']}, at {limit} tokens\n")
    sys.stderr.write("written: " + ", ".join(map(str, folders)) + "\n")
    uploads = [folder / SUBMISSION for folder in folders if (folder / SUBMISSION).is_dir()]
    if uploads:
        sys.stderr.write("for servers and official scripts: " + ", ".join(map(str, uploads)) + "\n")


def _report(output_dir: Path) -> None:
    """Update the report and the model card of the run with the scores; an error here does not fail the evaluation."""
    if (output_dir / "recipe.yaml").is_file():
        update_scores(output_dir)
        regenerate_report(output_dir)
