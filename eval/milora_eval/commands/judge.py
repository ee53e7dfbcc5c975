"""`python -m milora_eval judge FOLDER`: grade free-form answers with a judge model, then compute the scores."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from milora_eval.judge import Endpoint, judge_by, judge_from_file, unjudged
from milora_eval.scores.results import require_answers, score
from milora_eval.scores.table import write_table
from milora_eval.suites import import_plugins
from milora_vl.base.errors import UserError
from milora_vl.cli.command_line import next_step
from milora_vl.cli.flags import Command, option, shared
from milora_vl.cli.table import FORMATS, show

COMMAND = Command(
    "milora_eval judge",
    "Grade free-form answers with a judge model, then compute the scores.",
    """\
examples:
  python -m milora_eval judge runs/one/eval/mm-vet/final --endpoint https://api.openai.com/v1
  python -m milora_eval judge runs/one/eval/mm-vet/final --file judgements.jsonl
""",
    inputs=(
        option("folder", type=Path, metavar="FOLDER", help="results folder with MM-Vet or LLaVA-Bench"),
        (
            option("--endpoint", metavar="URL", help="OpenAI-compatible server, up to and including /v1"),
            option("--file", type=Path, help="file with existing judgements (JSONL or JSON)"),
        ),
    ),
    settings=(
        shared("plugin"),
        option("--judge_model", metavar="NAME", help="judge model (default: set by the benchmark)"),
        option(
            "--key_variable",
            default="OPENAI_API_KEY",
            metavar="NAME",
            help="environment variable with the API key (default: %(default)s)",
        ),
    ),
    outputs=(shared("format", choices=FORMATS),),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Each judgement is stored at once, so an interrupted run can resume."""
    options = COMMAND.parse(argv)
    import_plugins(options.plugin)
    from tqdm import tqdm

    require_answers(options.folder)
    if options.file is not None:
        sys.stderr.write(f"{judge_from_file(options.file, options.folder)} judgements read from {options.file}\n")
    else:
        waiting = list(unjudged(options.folder))
        server = Endpoint(options.endpoint, os.environ.get(options.key_variable, ""))
        for line in tqdm(waiting, desc="judge", unit="answer", file=sys.stderr, disable=None):
            judge_by(server.ask, line, options.judge_model, options.folder)
    missing = sum(1 for _ in unjudged(options.folder))
    results = score(options.folder)
    table = write_table(options.folder)
    if options.format == "json":
        sys.stdout.write(json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    else:
        show(table, options.format)
    if missing:
        raise UserError(
            f"{missing} answers have no judgement yet; the scores are computed from the other answers",
            code="judge-incomplete",
            exit_code=1,
            hint="run the same command again to judge the others",
        )
    next_step("milora_eval", "view", options.folder)
    return 0
