"""`python -m milora_eval run`: load a model once, evaluate it (and optionally its base), print one table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from milora_data.encode.templates import OWN, template_name
from milora_eval.answers.questions import EvaluationPlan, Items, parse_shard, read_chosen
from milora_eval.answers.target import EvalTarget, eval_target
from milora_eval.chat_server import KEY_VARIABLE, ChatServer, api_key
from milora_eval.commands.flags import KEY, PROTOCOL
from milora_eval.scores.exports import SUBMISSION
from milora_eval.scores.results import read_results
from milora_eval.scores.table import write_table
from milora_eval.suites import choose, data_folder
from milora_vl.common.cli.command_line import next_step
from milora_vl.common.cli.flags import OR_ADAPTER, Command, count, flag, option, positive, shared
from milora_vl.common.cli.table import FORMATS, show
from milora_vl.common.errors import Problem, UserError, at_flag
from milora_vl.core.adapter.folders import holds_adapter, model_of
from milora_vl.report.model_card import update_scores
from milora_vl.report.page import regenerate_report

BATCH_SIZE, CONCURRENCY, FORGETTING_TOKENS = 32, 16, 8192
# `scales` has these flags too.
INPUTS = (
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
)
ASKING = (
    shared("limit", about="number of items per benchmark; a larger N contains the items of a smaller one"),
    PROTOCOL,
    shared("template"),
    shared("batch_size", default=BATCH_SIZE, about="questions per batch (default: %(default)s)"),
)
OUTPUTS = (
    shared("output_dir", required=True, about="output folder; files go to FOLDER/eval/SUITE/..."),
    shared("format", choices=FORMATS),
)
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
  python -m milora_eval run --server http://localhost:8000/v1 --served_model merged --suite emoji --output_dir out
""",
    inputs=(
        *INPUTS,
        option("--server", metavar="URL", help="ask a server with OpenAI's interface; up to and including /v1"),
        option("--served_model", metavar="NAME", help="name of the model on the --server"),
    ),
    settings=(
        shared("scale"),
        flag("--with_base", "also evaluate the base model"),
        *ASKING,
        option("--audit", type=count, default=0, help="ask N items again, one by one, and compare"),
        option(
            "--forgetting_tokens",
            type=count,
            default=FORGETTING_TOKENS,
            help="tokens of general text to measure forgetting on; 0 skips it (default: %(default)s)",
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
        KEY,
    ),
    outputs=OUTPUTS,
)


# Flags of a model that this program loads -> what they are without a value.
OF_LOADED = {
    "--model": None,
    "--adapter": None,
    "--base": None,
    "--template": None,
    "--device": None,
    "--dtype": None,
    "--with_base": False,
    "--scale": 1.0,
    "--batch_size": BATCH_SIZE,
    "--forgetting_tokens": FORGETTING_TOKENS,
}
OF_SERVED = {"--served_model": None, "--concurrency": None, "--key_variable": KEY_VARIABLE}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. All flags and data files are checked before the model is loaded."""
    options = COMMAND.parse(argv)
    server = None if options.server is None else _server(options)
    target = _target(options) if server is None else None
    plan, items = planned(options, target)
    plan = replace(plan, shard=parse_shard(options.shard), audit=options.audit)
    if target is not None:
        _announce(options, target)
    from milora_eval.evaluate import run_loaded, run_served

    if target is not None:
        folders = run_loaded(
            target,
            plan,
            items,
            options.output_dir,
            with_base=options.with_base,
            forgetting_tokens=options.forgetting_tokens,
        )
    else:
        assert server is not None
        folders = run_served(server, options.served_model, plan, items, options.output_dir)
    if folders is None:
        sys.stderr.write(f"shard {options.shard} is complete; the last shard to finish writes the results\n")
        return 0
    _print(options, folders)
    if target is not None:
        _report(options.output_dir)
    next_step("milora_eval", "view", *folders)
    return 0


def _server(options: argparse.Namespace) -> ChatServer:
    _refuse(options, OF_LOADED, "has no effect on a model on a server", "remove it, or --server")
    return ChatServer(options.server, api_key(options.key_variable))


def _target(options: argparse.Namespace) -> EvalTarget:
    _refuse(options, OF_SERVED, "belongs to a --server", "add:  --server URL")
    options.model = model_of(options.model, options.adapter, "milora_eval", "run", "--adapter")
    target = eval_target(
        options.model, options.adapter, options.base, options.scale, dtype=options.dtype, device=options.device
    )
    if options.with_base and not target.has_base:
        raise UserError(
            "this flag needs a trained model: --adapter A, or --model RUN with --base B",
            code="flag-conflict",
            where="--with_base",
        )
    return target


def _announce(options: argparse.Namespace, target: EvalTarget) -> None:
    run_folders = (target.folder.resolve(), target.folder.resolve().parent)  # a checkpoint is evaluated into its run
    if holds_adapter(options.output_dir) and options.output_dir.resolve() not in run_folders:
        sys.stderr.write(f"warning: {options.output_dir} holds another adapter; its scores and report are replaced\n")
    sys.stderr.write(f"loading {options.model}" + (f" with {target.adapter}\n" if target.adapter else "\n"))


def _refuse(options: argparse.Namespace, flags: Mapping[str, object], why: str, hint: str) -> None:
    """Raise UserError with a problem for each of these flags that has another value than this one."""
    typed = [flag for flag, default in flags.items() if getattr(options, flag[2:]) != default]
    if typed:
        raise UserError(problems=[Problem(why, "flag-conflict", flag, hint) for flag in typed])


def planned(options: argparse.Namespace, target: EvalTarget | None) -> tuple[EvaluationPlan, Items]:
    """Return the plan of --suite or --benchmarks, and the items of its benchmarks, which are read once.

    Without a target, a server answers, in the chat template of its model.

    Raises UserError for missing data.
    """
    value, name = (options.suite, "suite") if options.suite is not None else (options.benchmarks, "benchmarks")
    with at_flag(f"--{name}"):
        chosen = choose(value, options.protocol)
    if options.template is not None:
        with at_flag("--template"):
            template_name(options.template)
    with at_flag("--data"):
        data = data_folder(value, options.data)
    items = read_chosen(chosen, data, options.limit)
    from milora_vl.models.prompts import Prompts, prompts_of

    prompts = Prompts(OWN, "plain") if target is None else prompts_of(target.model, target.adapter, options.template)
    plan = EvaluationPlan(
        suite=chosen.name,
        benchmarks=tuple(benchmark for benchmark in chosen.benchmarks if benchmark.name in items),
        data_dir=data,
        template=prompts.template,
        image_aspect_ratio=prompts.image_aspect_ratio,
        limit=options.limit or chosen.limit,
        batch_size=options.batch_size if target else options.concurrency or CONCURRENCY,
    )
    return plan, items


def _print(options: argparse.Namespace, folders: list[Path]) -> None:
    results = [read_results(folder) for folder in folders]
    table = write_table(folders[-1])  # with the forgetting, which is measured after the answers
    if options.format == "json":
        sys.stdout.write(
            json.dumps({result["which"]: result for result in results}, ensure_ascii=False, indent=1) + "\n"
        )
    else:
        show(table, options.format)
    for result in results:
        for entry in result["benchmarks"]:
            if entry["truncated"]:
                limit = result["generation"]["max_new_tokens"][entry["name"]]
                sys.stderr.write(f"truncated: {entry['truncated']:,} of {entry['n']:,} answers of {result['which']} ")
                sys.stderr.write(f"to {entry['name']}, at {limit} tokens\n")
        if result.get("audit"):
            sys.stderr.write(f"audit of {result['which']}: {result['audit']['changed']} of {result['audit']['n']} ")
            sys.stderr.write("answers changed when asked one by one\n")
    sys.stderr.write("written: " + ", ".join(map(str, folders)) + "\n")
    uploads = [folder / SUBMISSION for folder in folders if (folder / SUBMISSION).is_dir()]
    if uploads:
        sys.stderr.write("for servers and official scripts: " + ", ".join(map(str, uploads)) + "\n")


def _report(output_dir: Path) -> None:
    """Update the report and the model card of the run with the scores; an error here does not fail the evaluation."""
    if not (output_dir / "recipe.yaml").is_file():
        return
    update_scores(output_dir)
    regenerate_report(output_dir)
